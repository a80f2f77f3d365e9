//! The page that says which files can be opened is complete, and each of its rows has tests, as those of the page that
//! says where results go.

use std::{collections::BTreeSet, fs, path::Path};

use burn_lora::gguf::Packing;
use burn_lora_llm::gguf::families;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// The cells of the table under a heading.
fn table(heading: &str) -> Vec<Vec<String>> {
    let pages = ["docs/files.md", "docs/results.md"];
    let page = pages.map(|page| fs::read_to_string(root().join(page)).unwrap()).concat();
    let lines = page.lines().skip_while(|line| *line != format!("## {heading}")).skip(1);
    let lines = lines.take_while(|line| !line.starts_with("## "));
    let rows = lines.filter(|line| line.starts_with('|')).skip(2);
    let cells = |row: &str| {
        let row = row.trim_matches('|').split('|');
        row.map(|cell| cell.trim().replace('`', "")).collect::<Vec<_>>()
    };
    let rows: Vec<_> = rows.map(cells).collect();
    assert!(!rows.is_empty(), "there is no table under {heading}");
    rows
}

/// The names of all tests.
fn tests() -> BTreeSet<String> {
    fn visit(dir: &Path, found: &mut BTreeSet<String>) {
        for entry in fs::read_dir(dir).unwrap().map(|it| it.unwrap().path()) {
            if entry.is_dir() {
                visit(&entry, found);
            } else if entry.extension().is_some_and(|it| it == "rs") {
                let text = fs::read_to_string(entry).unwrap();
                let after = text.split("#[test]\nfn ").skip(1);
                found.extend(after.filter_map(|it| Some(it.split_once('(')?.0.to_owned())));
            }
        }
    }
    let mut found = BTreeSet::new();
    for dir in ["tests", "llm/tests"] {
        visit(&root().join(dir), &mut found);
    }
    found
}

#[test]
fn each_row_has_tests() {
    let tests = tests();
    for heading in ["Families", "Rules of RoPE", "Types of tensors", "Programs"] {
        for row in table(heading) {
            let named: Vec<_> = row.last().unwrap().split(", ").collect();
            for name in named {
                assert!(tests.contains(name), "{row:?}: there is no test `{name}`");
            }
        }
    }
}

#[test]
fn the_table_of_families_is_complete() {
    let rows = table("Families").into_iter().map(|row| [row[2].clone(), row[1].clone()]);
    let rows: BTreeSet<_> = rows.collect();
    let known: BTreeSet<_> = families().map(|names| names.map(str::to_owned)).collect();
    // Files of Mistral are those of Llamas.
    let others: Vec<_> = rows.difference(&known).collect();
    assert_eq!(others, [&["llama".to_owned(), "mistral".to_owned()]]);
    assert!(known.is_subset(&rows), "{rows:?}");
}

#[test]
fn the_table_of_types_is_complete() {
    let rows: BTreeSet<_> =
        table("Types of tensors").into_iter().map(|row| row[0].clone()).collect();
    assert_eq!(rows, Packing::all().map(|it| it.to_string()).collect());
}

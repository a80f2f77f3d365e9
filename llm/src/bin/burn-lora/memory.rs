//! Whether the steps of a training fit into the memory of the machine.

use std::fs;

use burn_lora_llm::data::{Text, tokens};

use crate::{backend, train::Model};

/// A warning, if one of these steps needs more memory than is free. A step has a part for each worker, which has
/// rows of texts.
///
/// Memory is only known on Linux, and for a backend that computes on the CPU.
pub fn warning(model: &Model, steps: &[Vec<Vec<Vec<&Text>>>], segmented: bool) -> Option<String> {
    if !backend::ON_CPU {
        return None;
    }
    let of_part = |rows: &Vec<Vec<&Text>>| {
        let longest = rows.iter().map(|row| tokens(row)).max().unwrap_or(0);
        model.activations(rows.len() * longest, segmented)
    };
    let needed = steps.iter().map(|parts| parts.iter().map(of_part).sum()).max()?;
    message(needed, free()?, segmented)
}

fn message(needed: usize, free: usize, segmented: bool) -> Option<String> {
    let mib = |bytes: usize| bytes >> 20;
    let less = if segmented {
        "--max-length, --batch"
    } else {
        "--segments, or a smaller --max-length, --batch"
    };
    (needed > free).then(|| {
        format!(
            "a step needs about {} MiB of memory, and {} MiB are free: it may be ended by the system. Use {less} or \
             --workers",
            mib(needed),
            mib(free),
        )
    })
}

/// The bytes that can still be taken: of the machine, and of the group of processes that this one is in.
fn free() -> Option<usize> {
    let machine = available(&fs::read_to_string("/proc/meminfo").ok()?)?;
    let read = |name: &str| fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok();
    let group = read("memory.max").zip(read("memory.current"));
    let group = group.and_then(|(most, taken)| left(&most, &taken));
    // Pages of files that were read count as taken, and are given back when they are needed.
    let files = read("memory.stat").and_then(|it| of_files(&it)).unwrap_or(0);
    Some(group.map_or(machine, |group| machine.min(group + files)))
}

/// What `/proc/meminfo` says is available, in bytes.
fn available(meminfo: &str) -> Option<usize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
}

/// The bytes of files that nobody reads at the time, as `memory.stat` counts them.
fn of_files(stat: &str) -> Option<usize> {
    stat.lines().find_map(|line| line.strip_prefix("inactive_file "))?.trim().parse().ok()
}

/// What is left below a limit, which may be `max` for none.
fn left(most: &str, taken: &str) -> Option<usize> {
    let [most, taken] = [most, taken].map(|it| it.trim().parse::<usize>().ok());
    Some(most?.saturating_sub(taken?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_memory_is_read() {
        let meminfo = "MemTotal:       24689744 kB\nMemFree:  1 kB\nMemAvailable:   20480 kB\n";
        assert_eq!(available(meminfo), Some(20 << 20));
        assert_eq!(available("MemTotal: 3 kB\n"), None);
        assert_eq!(of_files("anon 5\ninactive_file 4096\n"), Some(4096));
        assert_eq!(left("1000\n", "400\n"), Some(600));
        assert_eq!(left("1000\n", "1400\n"), Some(0));
        assert_eq!(left("max\n", "400\n"), None);
        if cfg!(target_os = "linux") {
            assert!(free().is_some_and(|free| free > 1 << 20));
        }
    }

    #[test]
    fn the_warning_names_what_helps() {
        assert_eq!(message(5 << 20, 5 << 20, false), None);
        let found = message(3 << 30, 2 << 30, false).unwrap();
        assert!(found.contains("about 3072 MiB") && found.contains("2048 MiB are free"), "{found}");
        assert!(found.contains("--segments") && found.contains("--max-length"), "{found}");
        assert!(!message(3 << 30, 2 << 30, true).unwrap().contains("--segments"));
    }
}

//! The names under which files hold what was trained in full.

use std::collections::{BTreeMap, BTreeSet};

use crate::traverse::Seen;

/// Adds the modules of the parameters that are `covered`, each with the name that covers it.
///
/// PEFT compares the ends of modules' names as mere text. A name in its file must not mean a module whose parameters
/// are not all in the file, so their parameters are named one by one then.
pub(super) fn note(modules: &mut Vec<String>, params: &[Seen], covered: &[(&Seen, &str)]) {
    let saved: BTreeSet<_> = covered.iter().map(|(param, _)| &param.path).collect();
    let means_more = |module: &str| {
        params.iter().any(|param| {
            let mut within = param.path.match_indices('.').map(|(end, _)| &param.path[..end]);
            within.any(|it| it.ends_with(module)) && !saved.contains(&param.path)
        })
    };
    let mut more = BTreeMap::new();
    for (param, module) in covered {
        // A norm's parameters by themselves go by PyTorch's names.
        let by_itself =
            *module == param.path || *more.entry(*module).or_insert_with(|| means_more(module));
        let name = if by_itself { &param.torch_name } else { *module };
        if !modules.iter().any(|it| it == name) {
            modules.push(name.to_owned());
        }
    }
}

//! Which layers of a model get adapters.

use super::LoraConfig;
use crate::{
    error::LoraError,
    pattern::{Pattern, require_matches},
};

impl LoraConfig {
    /// Chooses, from the paths of all layers, those that get an adapter: those that a target matches, or
    /// all if there are no targets, without those that are excluded or train in full.
    ///
    /// Fails if a pattern other than those of `modules_to_save` matches no path, or if no path is left.
    pub(crate) fn choose(&self, paths: &[String]) -> Result<Vec<String>, LoraError> {
        let targets = Pattern::all(&self.targets)?;
        let excludes = Pattern::all(&self.excludes)?;
        let in_full = Pattern::all(&self.modules_to_save)?;
        let ranks = Pattern::all(self.rank_pattern.iter().map(|(pattern, _)| pattern))?;
        let alphas = Pattern::all(self.alpha_pattern.iter().map(|(pattern, _)| pattern))?;
        for (field, patterns) in [
            ("targets", &targets),
            ("excludes", &excludes),
            ("rank_pattern", &ranks),
            ("alpha_pattern", &alphas),
        ] {
            require_matches(field, patterns, paths, Pattern::matches)?;
        }

        let is_chosen = |path: &&String| {
            (targets.is_empty() || targets.iter().any(|target| target.matches(path)))
                && !excludes.iter().any(|exclude| exclude.matches(path))
                && !in_full.iter().any(|module| module.covers(path))
        };
        let chosen: Vec<_> = paths.iter().filter(is_chosen).cloned().collect();
        if chosen.is_empty() {
            let field = "targets, without excludes and modules_to_save,";
            return Err(LoraError::unmatched(field, self.targets.clone(), paths));
        }
        Ok(chosen)
    }
}

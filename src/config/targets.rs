//! Which layers of a model are meant.

use crate::{
    error::LoraError,
    pattern::{Pattern, require_matches},
};

/// The patterns that choose layers, compiled.
pub(crate) struct Targets {
    targets: Vec<Pattern>,
    excludes: Vec<Pattern>,
    modules_to_save: Vec<Pattern>,
}

impl Targets {
    pub fn new(
        targets: &[String],
        excludes: &[String],
        modules_to_save: &[String],
    ) -> Result<Self, LoraError> {
        Ok(Self {
            targets: Pattern::all(targets)?,
            excludes: Pattern::all(excludes)?,
            modules_to_save: Pattern::all(modules_to_save)?,
        })
    }

    /// Fails if a target or an exclude matches no path.
    pub fn require_matches(&self, paths: &[String]) -> Result<(), LoraError> {
        require_matches("targets", &self.targets, paths, Pattern::matches)?;
        require_matches("excludes", &self.excludes, paths, Pattern::matches)
    }

    /// The paths that a target matches, or all if there are no targets, without those that are excluded or train
    /// in full. Fails if none is left.
    pub fn choose<'a>(&self, paths: &'a [String]) -> Result<Vec<&'a String>, LoraError> {
        let is_chosen = |path: &&String| {
            (self.targets.is_empty() || self.targets.iter().any(|target| target.matches(path)))
                && !self.excludes.iter().any(|exclude| exclude.matches(path))
                && !self.modules_to_save.iter().any(|module| module.covers(path))
        };
        let chosen: Vec<_> = paths.iter().filter(is_chosen).collect();
        if chosen.is_empty() {
            let field = "targets, without excludes and modules_to_save,";
            let targets = self.targets.iter().map(|it| it.source().to_owned());
            return Err(LoraError::unmatched(field, targets.collect(), paths));
        }
        Ok(chosen)
    }

    pub fn into_modules_to_save(self) -> Vec<Pattern> {
        self.modules_to_save
    }
}

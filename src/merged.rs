use std::ops::Deref;

/// A model, or a layer, with its adapters merged into the base: a plain model that costs nothing
/// extra. It can be used as such through `Deref`.
///
/// The original is kept next to it, so that [`unmerge`](Self::unmerge) restores every bit, which
/// subtracting the update again could not. It shares what was not merged, and costs memory for the
/// weights that were; [`into_plain`](Self::into_plain) lets go of it.
#[derive(Clone, Debug)]
pub struct Merged<M> {
    plain: M,
    original: M,
}

impl<M> Merged<M> {
    pub(crate) fn new(plain: M, original: M) -> Self {
        Self { plain, original }
    }

    /// The merged model alone; the original, and with it the way back, is dropped.
    pub fn into_plain(self) -> M {
        self.plain
    }

    /// The model as it was before it was merged, to the bit.
    pub fn unmerge(self) -> M {
        self.original
    }
}

impl<M> Deref for Merged<M> {
    type Target = M;

    fn deref(&self) -> &M {
        &self.plain
    }
}

//! What a model is without what this crate put around it.

/// A model as its owner has it: the model itself, or the stock module in an
/// [`Overlay`](crate::overlay::Overlay).
///
/// It is what [`Lora::merge`](crate::Lora::merge) and [`Lora::detach`](crate::Lora::detach) return. There is
/// nothing to implement. Of an overlay, which is a model itself, they can also return the overlay; so the type of
/// their result has to be known there, as in `let lstm: Lstm<B> = lora.merge()?`.
pub trait IntoPlain<P> {
    /// The plain model. Adapters of an overlay are dropped.
    fn into_plain(self) -> P;
}

impl<M> IntoPlain<M> for M {
    fn into_plain(self) -> M {
        self
    }
}

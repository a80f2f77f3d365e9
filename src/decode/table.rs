use std::sync::Arc;

use burn::tensor::backend::Backend;

use super::{Linear, Update, linear::on_host};
use crate::{adapter::LoraAdapter, layer::LoraEmbedding};

/// A table of embeddings in the memory of the host: `[n_embedding, d_model]`.
#[derive(Clone, Debug)]
pub struct Table {
    rows: Linear,
    own: Option<Arc<TableUpdate>>,
}

/// What an adapter adds to a table.
#[derive(Clone, Debug)]
pub struct TableUpdate {
    lookup: Update,
    projection: Option<Update>,
}

impl TableUpdate {
    /// The update. `None` as for [`Update::of`].
    pub fn of<B: Backend>(adapter: &LoraAdapter<B>, halves: bool) -> Option<Self> {
        let lookup = Update::of_lookup(adapter, halves)?;
        Some(Self { lookup, projection: Update::of_projection(adapter, halves)? })
    }

    /// That of the table as an output projection, if there is one.
    pub fn projection(&self) -> Option<&Update> {
        self.projection.as_ref()
    }
}

impl Table {
    /// The table, with its adapter. `None` as for [`Linear::of`].
    pub fn of<B: Backend>(layer: &LoraEmbedding<B>, halves: bool) -> Option<Self> {
        if layer.is_mixed() {
            return None;
        }
        let own = match layer.adapter() {
            Some(adapter) => Some(Arc::new(TableUpdate::of(adapter, halves)?)),
            None => None,
        };
        Some(Self { rows: Linear::of_weight(on_host(&layer.base_projection())?), own })
    }

    /// `[n_embedding, d_model]`
    pub fn dims(&self) -> [usize; 2] {
        let [d_model, n_embedding] = self.rows.dims();
        [n_embedding, d_model]
    }

    /// Looks up a row, with the update that the text has: `[d_model]`.
    ///
    /// # Panics
    ///
    /// If there is no such row, or `to` has another length.
    pub fn look_up(&self, row: usize, update: Option<&TableUpdate>, to: &mut [f32]) {
        let [count, width] = self.dims();
        assert!(row < count && to.len() == width, "row {row} of {count} x {width} to {}", to.len());
        self.rows.weight().row(row, to);
        for update in [self.own.as_deref(), update].into_iter().flatten() {
            update.lookup.add(&update.lookup.looked_up(row), 0, to);
        }
    }

    /// The table as an output projection, `[rows, d_model]` to `[rows, n_embedding]`, for which
    /// [`TableUpdate::projection`] has the update.
    pub fn projection(&self) -> Linear {
        let own = self.own.as_ref().and_then(|it| it.projection.clone());
        self.rows.clone().with_own(own)
    }
}

//! Running statistics of batch norms. Burn keeps them in cells that all clones of a model share, and
//! every forward pass on an autodiff backend moves them, whether the model is frozen or not. Those of this crate's
//! norm are each model's own.

use std::{cell::RefCell, collections::BTreeMap, rc::Rc};

use burn::{
    module::{Module, Param},
    tensor::{Tensor, backend::Backend},
};

use super::walk::{self, Place, Visit};
use crate::layer::{Statistic, access::Reach};

/// Has the shared statistics take in what the last passes left for them.
pub(crate) fn sync<B: Backend, M: Module<B>>(model: &M) {
    // Burn does so, for all clones at once, when it makes a record.
    drop(model.clone().into_record());
}

/// Calls `reach` for each statistic that no other model shares, with its path.
fn each<B: Backend, M: Module<B>>(model: &M, reach: impl Fn(&str, &Statistic<B>) + 'static) {
    struct Each<F>(Rc<F>);
    impl<B: Backend, F: Fn(&str, &Statistic<B>) + 'static> Visit<B> for Each<F> {
        fn param<const D: usize>(&mut self, _place: &Place, _param: &Param<Tensor<B, D>>) {}

        fn reach(&mut self, path: &str) -> Option<Reach<B>> {
            let (reach, path) = (self.0.clone(), path.to_owned());
            Some(Box::new(move |statistic| reach(&path, statistic)))
        }
    }
    walk::visit(model, &mut Each(Rc::new(reach)));
}

/// Moves the statistics of `model` to where passes moved those of its copies: to the mean, where there are several.
/// Burn does so with statistics that the copies share.
pub(crate) fn follow<B: Backend, M: Module<B>>(model: &M, copies: &[&M]) {
    let moved: Rc<RefCell<BTreeMap<String, Vec<Tensor<B, 1>>>>> = Rc::default();
    for copy in copies {
        let moved = moved.clone();
        each(*copy, move |path, statistic| {
            if let Some(value) = statistic.moved() {
                moved.borrow_mut().entry(path.to_owned()).or_default().push(value);
            }
        });
    }
    let moved = moved.take();
    if moved.is_empty() {
        return;
    }
    each(model, move |path, statistic: &Statistic<B>| {
        let Some(values) = moved.get(path) else { return };
        let device = statistic.value().device();
        let values = values.iter().map(|value| value.clone().to_device(&device));
        let sum = values.reduce(|sum, value| sum + value).expect("one at least");
        statistic.move_to(match moved[path].len() {
            1 => sum,
            count => sum / count as f64,
        });
    });
}

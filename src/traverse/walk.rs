//! Walks through any model, that know where they are.

use std::{cell::RefCell, collections::BTreeSet, rc::Rc};

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param},
    tensor::{Bool, Int, Tensor, backend::Backend},
};

use crate::{
    adapter::FROZEN,
    layer::{
        LoraLayer, LoraLayerMut,
        access::{self, ADAPTER, Change, OWN, Reach, Read, TAG},
        is_quantized,
    },
};

/// The place of a walk in the tree of modules. Entering and leaving a module allocates nothing, since
/// walks are most of what a switch of adapters costs.
#[derive(Default)]
pub(crate) struct Place {
    path: String,
    /// The length of the path before each of its names.
    lengths: Vec<usize>,
    /// The containers of all names, one after the other.
    containers: String,
    /// Where each of them starts.
    starts: Vec<usize>,
    /// How many names there are before that of the adapter which the walk is in.
    adapter: Option<usize>,
    /// How many names there are up to that of the statistic which the walk is in, if no other model shares it.
    own: Option<usize>,
}

impl Place {
    fn enter(&mut self, name: &str, container: &str) {
        if self.adapter.is_none() && name == ADAPTER && container == TAG {
            self.adapter = Some(self.lengths.len());
        }
        if container == OWN {
            self.own = Some(self.lengths.len());
        }
        self.lengths.push(self.path.len());
        if !self.path.is_empty() {
            self.path.push('.');
        }
        self.path.push_str(name);
        self.starts.push(self.containers.len());
        self.containers.push_str(container);
    }

    fn exit(&mut self) {
        self.path.truncate(self.lengths.pop().unwrap_or_default());
        self.containers.truncate(self.starts.pop().unwrap_or_default());
        if self.adapter == Some(self.lengths.len()) {
            self.adapter = None;
        }
        if self.own.is_some_and(|names| names > self.lengths.len()) {
            self.own = None;
        }
    }

    /// The path of the parameter that the walk is at.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The path of the module that the parameter belongs to.
    pub fn module(&self) -> &str {
        &self.path[..self.lengths.last().copied().unwrap_or_default()]
    }

    /// The parameter's own name.
    pub fn name(&self) -> &str {
        self.path[self.module().len()..].trim_start_matches('.')
    }

    /// The kind of module that the parameter belongs to.
    pub fn container(&self) -> &str {
        &self.containers[self.starts.last().copied().unwrap_or_default()..]
    }

    /// The path of the LoRA layer whose adapter the walk is in, if it is in one.
    pub fn adapted_layer(&self) -> Option<&str> {
        self.adapter.map(|names| &self.path[..self.lengths[names]])
    }

    /// Whether the walk is at the running statistics of a batch norm. They look like parameters to a
    /// walk, and no gradient may ever reach them.
    pub fn is_statistic(&self) -> bool {
        self.container() == "Struct:BatchNorm" && self.name().starts_with("running_")
    }

    /// Whether these are in a cell that all clones of the model share, as Burn's are.
    pub fn is_shared_statistic(&self) -> bool {
        self.is_statistic() && self.own.is_none()
    }

    /// Whether the walk is at a factor that stays as it was drawn.
    pub fn is_frozen_factor(&self) -> bool {
        self.container() == FROZEN
    }

    /// What PyTorch calls a parameter of `dims` dimensions here, and how it keeps it.
    pub fn in_torch(&self, dims: usize) -> InTorch {
        let (module, container, name) = (self.module(), self.container(), self.name());
        let is_norm = container.ends_with("Norm");
        let name = match name {
            "gamma" if is_norm => "weight",
            "beta" if is_norm => "bias",
            name => name,
        };
        let transposed = container == "Struct:Linear" && name == "weight" && dims == 2;
        let dot = if module.is_empty() { "" } else { "." };
        InTorch { name: format!("{module}{dot}{name}"), transposed }
    }
}

/// A parameter as PyTorch has it.
pub(crate) struct InTorch {
    pub name: String,
    /// Whether it is the transpose of Burn's.
    pub transposed: bool,
}

/// What a visit does at each float parameter.
pub(crate) trait Visit<B: Backend> {
    fn param<const D: usize>(&mut self, place: &Place, param: &Param<Tensor<B, D>>);

    /// The request to read the layer at `path`.
    fn read(&mut self, _path: String) -> Option<Read<B>> {
        None
    }

    /// The request to reach the running statistic at `path`, if no other model shares it.
    fn reach(&mut self, _path: &str) -> Option<Reach<B>> {
        None
    }
}

/// What a walk that changes a model does at each float parameter.
pub(crate) trait Map<B: Backend> {
    fn param<const D: usize>(
        &mut self,
        _place: &Place,
        param: Param<Tensor<B, D>>,
    ) -> Param<Tensor<B, D>> {
        param
    }

    /// The request to change the layer at `path`.
    fn change(&mut self, _path: String) -> Option<Change<B>> {
        None
    }
}

/// A walk by Burn's visitor or mapper.
pub(crate) struct Walk<W> {
    place: Place,
    walker: W,
}

impl<W> Walk<W> {
    pub fn new(walker: W) -> Self {
        Self { place: Place::default(), walker }
    }
}

impl<B: Backend, W: Visit<B>> ModuleVisitor<B> for Walk<&mut W> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.place.enter(name, container);
        if name == ADAPTER && container == TAG {
            self.walker.read(self.place.module().to_owned()).into_iter().for_each(access::request);
        }
        if container == OWN {
            self.walker.reach(self.place.module()).into_iter().for_each(access::request);
        }
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.place.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        self.walker.param(&self.place, param);
    }

    // Those of other types draw their values, which is all that a visit ever wants of them.
    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<B, D, Int>>) {
        param.val();
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<B, D, Bool>>) {
        param.val();
    }
}

impl<B: Backend, W: Map<B>> ModuleMapper<B> for Walk<W> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.place.enter(name, container);
        if name == ADAPTER && container == TAG {
            self.walker
                .change(self.place.module().to_owned())
                .into_iter()
                .for_each(access::request);
        }
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.place.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        self.walker.param(&self.place, param)
    }
}

/// Visits every float parameter, and every layer.
pub(crate) fn visit<B: Backend, M: Module<B>>(model: &M, visit: &mut impl Visit<B>) {
    model.visit(&mut Walk::new(visit));
}

/// Maps every float parameter, and every layer.
pub(crate) fn map<B: Backend, M: Module<B>>(model: M, map: &mut impl Map<B>) -> M {
    model.map(&mut Walk::new(map))
}

/// What a visit learns of a float parameter.
pub(crate) struct Seen {
    pub path: String,
    /// The path of the module that it belongs to.
    pub module: String,
    /// Its name and its shape in PyTorch.
    pub torch_name: String,
    pub torch_shape: Vec<usize>,
    /// Whether PyTorch's `Linear` has it transposed.
    pub transposed: bool,
    pub num_elements: usize,
    pub is_quantized: bool,
    pub requires_grad: bool,
    pub in_adapter: bool,
    pub is_statistic: bool,
    /// Whether it is a running statistic that all clones of the model share.
    pub is_shared: bool,
}

impl Seen {
    /// Whether it is a weight or a bias of a layer whose path `is_layer` accepts. A weight that is no
    /// layer's counts as one by its own path.
    pub fn is_base_of(&self, is_layer: impl Fn(&str) -> bool) -> bool {
        !self.in_adapter && (is_layer(&self.module) || is_layer(&self.path))
    }
}

impl<B: Backend> Visit<B> for Vec<Seen> {
    fn param<const D: usize>(&mut self, place: &Place, param: &Param<Tensor<B, D>>) {
        let in_torch = place.in_torch(D);
        // This draws the value of a parameter that was never used. Its lazy shape would not do: that
        // of a column layout is the transpose until the value is drawn.
        let mut shape = param.shape().to_vec();
        if in_torch.transposed {
            shape.swap(0, 1);
        }
        self.push(Seen {
            path: place.path().to_owned(),
            module: place.module().to_owned(),
            num_elements: shape.iter().product(),
            torch_name: in_torch.name,
            torch_shape: shape,
            transposed: in_torch.transposed,
            is_quantized: is_quantized(param.dtype()),
            requires_grad: param.is_require_grad(),
            in_adapter: place.adapted_layer().is_some(),
            is_statistic: place.is_statistic(),
            is_shared: place.is_shared_statistic(),
        });
    }
}

/// Every float parameter of the model. Those that were never used draw their values now.
pub(crate) fn params<B: Backend, M: Module<B>>(model: &M) -> Vec<Seen> {
    let mut seen = Vec::new();
    visit(model, &mut seen);
    seen
}

/// Draws the values of the parameters that were never used, so that clones of the model agree from
/// here on. Returns the paths of running statistics that clones share.
pub(crate) fn draw<B: Backend, M: Module<B>>(model: &M) -> BTreeSet<String> {
    struct Drawer(BTreeSet<String>);
    impl<B: Backend> Visit<B> for Drawer {
        fn param<const D: usize>(&mut self, place: &Place, param: &Param<Tensor<B, D>>) {
            param.val();
            if place.is_shared_statistic() {
                self.0.insert(place.path().to_owned());
            }
        }
    }
    let mut drawer = Drawer(BTreeSet::new());
    visit(model, &mut drawer);
    drawer.0
}

/// Whether exactly the parameters at these paths are marked as training.
pub(crate) fn marks_are<B: Backend, M: Module<B>>(model: &M, trains: &BTreeSet<String>) -> bool {
    struct Comparer<'a>(&'a BTreeSet<String>, bool);
    impl<B: Backend> Visit<B> for Comparer<'_> {
        fn param<const D: usize>(&mut self, place: &Place, param: &Param<Tensor<B, D>>) {
            self.1 &= param.is_require_grad() == self.0.contains(place.path());
        }
    }
    let mut comparer = Comparer(trains, true);
    visit(model, &mut comparer);
    comparer.1
}

impl<B: Backend, W: Map<B>> Map<B> for &mut W {
    fn param<const D: usize>(
        &mut self,
        place: &Place,
        param: Param<Tensor<B, D>>,
    ) -> Param<Tensor<B, D>> {
        (**self).param(place, param)
    }

    fn change(&mut self, path: String) -> Option<Change<B>> {
        (**self).change(path)
    }
}

struct Reader<F, T> {
    read: Rc<F>,
    found: Rc<RefCell<Vec<T>>>,
}

impl<B, F, T> Visit<B> for Reader<F, T>
where
    B: Backend,
    F: Fn(&str, &dyn LoraLayer<B>) -> T + 'static,
    T: 'static,
{
    fn param<const D: usize>(&mut self, _place: &Place, _param: &Param<Tensor<B, D>>) {}

    fn read(&mut self, path: String) -> Option<Read<B>> {
        let (read, found) = (self.read.clone(), self.found.clone());
        Some(Box::new(move |layer| found.borrow_mut().push(read(&path, layer))))
    }
}

/// What `read` returns for each LoRA layer in the model, in the model's order.
pub(crate) fn layers<B, M, T>(
    model: &M,
    read: impl Fn(&str, &dyn LoraLayer<B>) -> T + 'static,
) -> Vec<T>
where
    B: Backend,
    M: Module<B>,
    T: 'static,
{
    let found = Rc::default();
    visit(model, &mut Reader { read: Rc::new(read), found: Rc::clone(&found) });
    found.take()
}

/// The paths of the LoRA layers in the model, in its order.
pub(crate) fn layer_paths<B: Backend, M: Module<B>>(model: &M) -> Vec<String> {
    layers(model, |path, _: &dyn LoraLayer<B>| path.to_owned())
}

struct Changer<F> {
    change: Rc<RefCell<F>>,
}

impl<B, F> Map<B> for Changer<F>
where
    B: Backend,
    F: FnMut(&str, &mut dyn LoraLayerMut<B>) + 'static,
{
    fn change(&mut self, path: String) -> Option<Change<B>> {
        let change = self.change.clone();
        Some(Box::new(move |layer| (change.borrow_mut())(&path, layer)))
    }
}

/// A mapper that calls `change` for each LoRA layer of a model.
pub(crate) fn changer<B: Backend>(
    change: impl FnMut(&str, &mut dyn LoraLayerMut<B>) + 'static,
) -> impl ModuleMapper<B> {
    Walk::new(Changer { change: Rc::new(RefCell::new(change)) })
}

//! A training that was stopped or killed resumes from checkpoints that hold only what trains. The result
//! has the same bits as that of a training without a stop.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use burn::{
    data::{
        dataloader::{DataLoader, DataLoaderBuilder, batcher::Batcher},
        dataset::InMemDataset,
    },
    lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig,
    module::{AutodiffModule, Module, ModuleMapper, Param},
    nn::{BatchNorm, BatchNormConfig, Linear},
    optim::AdamWConfig,
    record::{
        BinGzFileRecorder, FileRecorder, FullPrecisionSettings, NamedMpkFileRecorder,
        NamedMpkGzFileRecorder, Recorder, RecorderError,
    },
    tensor::{Tensor, TensorData, activation::relu, backend::Backend},
    train::{
        InferenceStep, Learner, RegressionOutput, SupervisedTraining, TrainOutput, TrainStep,
        metric::LossMetric,
    },
};
use burn_lora::{
    Lora, LoraConfig, LoraLinear, LoraModule,
    train::{AtomicRecorder, LoraPlus, last_checkpoint},
};
use common::{
    backend::{Plain, Train},
    resume::Resumed,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde::{Serialize, de::DeserializeOwned};
use tempfile::TempDir;

const EPOCHS: usize = 5;

fn device<B: Backend>() -> B::Device {
    B::Device::default()
}

/// Values from `[-1, 1)`.
fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..count).map(|_| rng.random_range(-1.0f32..1.0)).collect()
}

/// The bits of every element.
fn bits<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<u32> {
    tensor.into_data().iter::<f32>().map(f32::to_bits).collect()
}

#[track_caller]
fn assert_identical<B: Backend, O: Backend, const D: usize>(
    actual: Tensor<B, D>,
    expected: Tensor<O, D>,
) {
    assert_eq!(bits(actual), bits(expected));
}

#[derive(Module, Debug)]
struct Net<B: Backend> {
    fc: LoraLinear<B>,
    frozen: Linear<B>,
    /// Its running statistics move although it is frozen.
    norm: BatchNorm<B>,
    head: Linear<B>,
}

/// The same weights each time, and in each process.
fn base<B: Backend>() -> Net<B> {
    let linear = |inputs: usize, outputs: usize, seed| Linear {
        weight: Param::from_tensor(Tensor::from_data(
            TensorData::new(random(inputs * outputs, seed), [inputs, outputs]),
            &device::<B>(),
        )),
        bias: None,
    };
    Net {
        fc: linear(6, 40, 1).into(),
        frozen: linear(40, 30, 2),
        norm: BatchNormConfig::new(30).init(&device::<B>()),
        head: linear(30, 3, 3),
    }
}

fn config() -> LoraConfig {
    LoraConfig::new(2, 3.0).with_modules_to_save(["head"]).with_seed(7)
}

#[derive(Module, Debug)]
struct Task<B: Backend> {
    net: Lora<B, Net<B>>,
}

impl Task<Train> {
    fn new(config: &LoraConfig) -> Self {
        Self { net: base::<Train>().with_own_statistics().attach(config).unwrap() }
    }
}

impl<B: Backend> Task<B> {
    fn regression(&self, x: Tensor<B, 2>) -> RegressionOutput<B> {
        let Net { fc, frozen, norm, head } = &*self.net;
        let hidden = frozen.forward(relu(fc.forward(x.clone())));
        let output = head.forward(relu(norm.forward(hidden)));
        let targets = x.narrow(1, 1, 3);
        let loss = (output.clone() - targets.clone()).square().mean();
        RegressionOutput::new(loss, output, targets)
    }
}

impl TrainStep for Task<Train> {
    type Input = Tensor<Train, 2>;
    type Output = RegressionOutput<Train>;

    fn step(&self, x: Self::Input) -> TrainOutput<Self::Output> {
        let output = self.regression(x);
        TrainOutput::new(self, output.loss.backward(), output)
    }
}

impl InferenceStep for Task<Plain> {
    type Input = Tensor<Plain, 2>;
    type Output = RegressionOutput<Plain>;

    fn step(&self, x: Self::Input) -> Self::Output {
        self.regression(x)
    }
}

#[derive(Clone)]
struct Rows;

impl<B: Backend> Batcher<B, Vec<f32>, Tensor<B, 2>> for Rows {
    fn batch(&self, items: Vec<Vec<f32>>, device: &B::Device) -> Tensor<B, 2> {
        let shape = [items.len(), 6];
        Tensor::from_data(TensorData::new(items.concat(), shape), device)
    }
}

/// A loader with another order for each epoch.
fn loader<B: Backend>() -> Arc<dyn DataLoader<B, Tensor<B, 2>>> {
    let rows = random(90 * 6, 4).chunks(6).map(<[f32]>::to_vec).collect();
    DataLoaderBuilder::new(Rows).batch_size(8).shuffle(3).build(InMemDataset::new(rows))
}

type MessagePack = NamedMpkFileRecorder<FullPrecisionSettings>;

/// Trains up to epoch `epochs`, starting from the last checkpoint in `dir`.
fn train<R: FileRecorder<Train> + FileRecorder<Plain> + 'static>(
    dir: &Path,
    epochs: usize,
    recorder: R,
) -> Net<Plain> {
    let done = last_checkpoint(dir).unwrap();
    let resumed = Resumed::new(loader::<Train>(), done.unwrap_or(0));
    let mut training = SupervisedTraining::new(dir, Arc::new(resumed), loader::<Plain>())
        .metrics((LossMetric::new(),))
        .with_file_checkpointer(recorder)
        .with_application_logger(None)
        .num_epochs(epochs);
    if let Some(epoch) = done {
        training = training.checkpoint(epoch);
    }
    let optimizer = LoraPlus::new(AdamWConfig::new().init::<Train, Task<Train>>(), 4.0);
    // The steps of the whole run, even if this part stops earlier.
    let steps = EPOCHS * 90_usize.div_ceil(8);
    let schedule = CosineAnnealingLrSchedulerConfig::new(0.02, steps).init().unwrap();
    let learner = Learner::new(Task::new(&config()), optimizer, schedule);
    training.launch(learner).model.net.into_inner()
}

fn assert_same(one: &Net<Plain>, other: &Net<Plain>) {
    let (a, b) = (one.fc.adapter().unwrap(), other.fc.adapter().unwrap());
    assert_identical(a.a.val(), b.a.val());
    assert_identical(a.b.val(), b.b.val());
    assert_identical(one.head.weight.val(), other.head.weight.val());
    assert_identical(one.norm.running_mean.value(), other.norm.running_mean.value());
    assert_identical(one.norm.running_var.value(), other.norm.running_var.value());
}

#[test]
fn a_resumed_training_comes_to_the_same_bits() {
    let dir = TempDir::new().unwrap();
    let recorder = AtomicRecorder::<MessagePack>::default();
    let straight = train(&dir.path().join("straight"), EPOCHS, recorder.clone());
    for end in [2, 3, EPOCHS - 1] {
        train(&dir.path().join("stopped"), end, recorder.clone());
        assert_eq!(last_checkpoint(dir.path().join("stopped")).unwrap(), Some(end));
    }
    let resumed = train(&dir.path().join("stopped"), EPOCHS, recorder);
    assert_same(&resumed, &straight);

    // The model has learned, and frozen parameters did not change.
    let start = base::<Plain>();
    assert_ne!(bits(resumed.head.weight.val()), bits(start.head.weight.val()));
    assert!(bits(resumed.fc.adapter().unwrap().b.val()).iter().any(|&bits| bits != 0));
    assert_identical(resumed.fc.base.weight.val(), start.fc.base.weight.val());
    assert_identical(resumed.frozen.weight.val(), start.frozen.weight.val());
    assert_identical(resumed.norm.gamma.val(), start.norm.gamma.val());
    assert_ne!(bits(resumed.norm.running_mean.value()), bits(start.norm.running_mean.value()));
}

/// Writes the first half of the optimizer's checkpoint of epoch 3, and aborts the process.
#[derive(Clone, Debug, Default)]
struct Killed(MessagePack);

impl<B: Backend> FileRecorder<B> for Killed {
    fn file_extension() -> &'static str {
        <MessagePack as FileRecorder<B>>::file_extension()
    }
}

impl<B: Backend> Recorder<B> for Killed {
    type Settings = FullPrecisionSettings;
    type RecordArgs = PathBuf;
    type RecordOutput = ();
    type LoadArgs = PathBuf;

    fn save_item<I: Serialize>(&self, item: I, file: PathBuf) -> Result<(), RecorderError> {
        Recorder::<B>::save_item(&self.0, item, file.clone())?;
        if file.to_string_lossy().contains("optim-3") {
            // Another thread writes the end of the checkpoint before.
            let checkpoint = file.parent().unwrap().parent().unwrap();
            while !checkpoint.join("scheduler-2.mpk").exists() {
                std::thread::yield_now();
            }
            let file = file.with_extension(<Self as FileRecorder<B>>::file_extension());
            let bytes = fs::read(&file).unwrap();
            fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
            std::process::abort();
        }
        Ok(())
    }

    fn load_item<I: DeserializeOwned>(&self, file: &mut PathBuf) -> Result<I, RecorderError> {
        Recorder::<B>::load_item(&self.0, file)
    }
}

const DIRECTORY: &str = "BURN_LORA_KILLED_IN";

#[test]
fn a_training_that_was_killed_while_it_wrote_goes_on() {
    let dir = TempDir::new().unwrap();
    let killed = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "resuming::is_killed_while_it_writes"])
        .env(DIRECTORY, dir.path().join("killed"))
        .output()
        .unwrap();
    assert!(!killed.status.success(), "it must not come to its end");

    // Half of a file exists, but under another name.
    let checkpoint = dir.path().join("killed/checkpoint");
    let mut files: Vec<_> = fs::read_dir(&checkpoint)
        .unwrap()
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort();
    let half = |it: &String| checkpoint.join(it).join("optim-3.mpk").exists();
    assert!(files.iter().any(half), "{files:?}");
    assert!(!files.contains(&"optim-3.mpk".to_owned()), "{files:?}");
    assert_eq!(last_checkpoint(dir.path().join("killed")).unwrap(), Some(2));

    let recorder = AtomicRecorder::<MessagePack>::default();
    let resumed = train(&dir.path().join("killed"), EPOCHS, recorder.clone());
    assert_same(&resumed, &train(&dir.path().join("straight"), EPOCHS, recorder));
}

#[test]
fn u4_a_checkpoint_that_is_cut_off_does_not_hide_the_one_before_it() {
    let dir = TempDir::new().unwrap();
    let recorder = AtomicRecorder::<MessagePack>::default();
    let straight = train(dir.path(), 3, recorder.clone());
    for file in ["model-3.mpk", "optim-3.mpk", "scheduler-3.mpk"] {
        let path = dir.path().join("checkpoint").join(file);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        assert_eq!(last_checkpoint(dir.path()).unwrap(), Some(2), "{file}");
        let error = Recorder::<Train>::load_item::<()>(&recorder, &mut path.clone()).unwrap_err();
        let expected = format!("{}: it is cut off", path.display());
        assert!(error.to_string().contains(&expected), "{error}");
        // The third epoch again, over the file that is cut off.
        assert_same(&train(dir.path(), 3, recorder.clone()), &straight);
        assert_eq!(last_checkpoint(dir.path()).unwrap(), Some(3));
    }
}

#[test]
#[ignore = "another test runs it in a process of its own"]
fn is_killed_while_it_writes() {
    let dir = std::env::var(DIRECTORY).expect("the other test says where");
    train(Path::new(&dir), EPOCHS, AtomicRecorder::new(Killed::default()));
}

#[test]
fn a_record_holds_what_trains_and_nothing_else() {
    let record = Task::new(&config()).net.into_record();
    let paths: Vec<_> = record.parameters.iter().map(|it| it.path.as_str()).collect();
    let norm = ["norm.gamma", "norm.beta", "norm.running_mean", "norm.running_var"];
    assert_eq!(paths, [&norm[..], &["head.weight"]].concat());
    let adapters = record.adapters.iter();
    let adapters: Vec<_> =
        adapters.map(|it| (it.path.as_str(), it.adapter.a.dims(), it.adapter.alpha)).collect();
    assert_eq!(adapters, [("fc", [6, 2], 3.0)]);
    assert_eq!(record.trains, ["fc.adapter.a", "fc.adapter.b", "head.weight"]);

    // The same for the model for inference, and as a file.
    let task = Task::new(&config());
    let of = |net: Lora<Plain, Net<Plain>>| net.into_record().parameters.len();
    assert_eq!(of(task.net.valid()), 5);
    let dir = TempDir::new().unwrap();
    task.save_file(dir.path().join("task"), &AtomicRecorder::<MessagePack>::default()).unwrap();
    let size = fs::metadata(dir.path().join("task.mpk")).unwrap().len() as usize;
    let values = 4 * (2 * (6 + 40) + 4 * 30 + 30 * 3);
    assert!((values..values + 2000).contains(&size), "{size} bytes for {values} of values");
}

#[test]
fn what_trains_does_so_after_every_trip() {
    let trains = |net: &Lora<Train, Net<Train>>| {
        let a = net.fc.adapter().unwrap().a.val().is_require_grad();
        [a, net.head.weight.val().is_require_grad(), net.frozen.weight.val().is_require_grad()]
    };
    let device = device::<Train>();
    let net = Task::new(&config()).net;
    for trip in [
        net.clone(),
        net.clone().to_device(&device),
        net.clone().fork(&device),
        // Without this crate, Burn loses here that the head is trainable.
        net.valid().clone().train::<Train>(),
        net.valid().to_device(&device).train::<Train>(),
        net.clone().load_record(net.clone().into_record()),
    ] {
        assert_eq!(trains(&trip), [true, true, false]);
    }
}

#[test]
fn a_factor_that_was_frozen_stays_frozen() {
    /// Freezes A.
    struct Freeze(bool);
    impl ModuleMapper<Train> for Freeze {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.0 = container == "Struct:LoraAdapter" && name == "a";
        }
        fn map_float<const D: usize>(
            &mut self,
            param: Param<Tensor<Train, D>>,
        ) -> Param<Tensor<Train, D>> {
            if self.0 { param.no_grad() } else { param }
        }
    }
    let net =
        base::<Train>().with_own_statistics().attach(&config()).unwrap().map(&mut Freeze(false));
    let device = device::<Train>();
    for trip in [
        net.clone().fork(&device),
        net.clone().to_device(&device),
        net.valid().train::<Train>(),
        net.clone().load_record(net.clone().into_record()),
    ] {
        let adapter = trip.fc.adapter().unwrap();
        assert!(!adapter.a.val().is_require_grad() && adapter.b.val().is_require_grad());
        assert_eq!(trip.into_record().trains, ["fc.adapter.b", "head.weight"]);
    }
}

#[test]
fn a_model_that_only_infers_learns_from_the_record_what_trained() {
    let record = Task::new(&config()).net.valid().into_record();
    let net = Lora::new(base::<Plain>()).load_record(record);
    assert_eq!(net.parameters().trainable, 2 * (6 + 40) + 30 * 3);
    assert_eq!(net.into_record().parameters.len(), 5);
}

#[test]
#[should_panic(expected = "`fc` has rank 2 and scale 3, and rank 3 and scale 3 in the record")]
fn a_record_of_another_rank_is_refused() {
    let other = LoraConfig::new(3, 3.0).with_modules_to_save(["head"]);
    Task::new(&config()).load_record(Task::new(&other).into_record());
}

#[test]
#[should_panic(expected = "disagree on whether these train: `head.weight`")]
fn a_record_without_the_head_is_refused() {
    let other = LoraConfig::new(2, 3.0);
    Task::new(&config()).load_record(Task::new(&other).into_record());
}

#[test]
#[should_panic(expected = "disagree on whether these train: `head.weight`")]
fn a_record_with_a_head_that_is_frozen_is_refused() {
    let other = LoraConfig::new(2, 3.0);
    Task::new(&other).load_record(Task::new(&config()).into_record());
}

#[test]
fn a_save_that_fails_leaves_the_old_file() {
    keeps_the_old_file(AtomicRecorder::<MessagePack>::default(), "file");
    keeps_the_old_file(AtomicRecorder::<MessagePack>::default(), "file.of.many-1.dots");
    // Extensions that contain a dot.
    keeps_the_old_file(
        AtomicRecorder::<BinGzFileRecorder<FullPrecisionSettings>>::default(),
        "file",
    );
    type MessagePackGz = NamedMpkGzFileRecorder<FullPrecisionSettings>;
    keeps_the_old_file(AtomicRecorder::<MessagePackGz>::default(), "file.mpk.gz");
}

fn keeps_the_old_file<R: FileRecorder<Plain>>(recorder: AtomicRecorder<R>, name: &str) {
    /// Its serialization fails.
    struct Broken;
    impl Serialize for Broken {
        fn serialize<S: serde::Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
            Err(serde::ser::Error::custom("broken"))
        }
    }
    let dir = TempDir::new().unwrap();
    let path = dir.path().join(name);
    let content = || Recorder::<Plain>::load_item::<String>(&recorder, &mut path.clone()).unwrap();
    Recorder::<Plain>::save_item(&recorder, "old", path.clone()).unwrap();
    let error = Recorder::<Plain>::save_item(&recorder, Broken, path.clone()).unwrap_err();
    assert!(error.to_string().contains(&dir.path().display().to_string()), "{error}");
    assert_eq!(content(), "old");
    Recorder::<Plain>::save_item(&recorder, "new", path.clone()).unwrap();
    assert_eq!(content(), "new");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left");
}

#[test]
fn files_with_names_alike_are_saved_at_once() {
    let dir = TempDir::new().unwrap();
    let recorder = AtomicRecorder::<MessagePack>::default();
    std::thread::scope(|scope| {
        for name in ["a.b.mpk", "a_b.mpk", "a.b.mpk"] {
            let (recorder, path) = (&recorder, dir.path().join(name));
            scope.spawn(move || {
                for _ in 0..100 {
                    Recorder::<Plain>::save_item(recorder, name, path.clone()).unwrap();
                    let item = Recorder::<Plain>::load_item::<String>(recorder, &mut path.clone());
                    assert_eq!(item.unwrap(), name);
                }
            });
        }
    });
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}

#[test]
fn a_saved_file_is_like_any_other() {
    let dir = TempDir::new().unwrap();
    // A name as long as the system allows.
    let path = dir.path().join(format!("{}.mpk", "n".repeat(251)));
    let recorder = AtomicRecorder::<MessagePack>::default();
    Recorder::<Plain>::save_item(&recorder, "item", path.clone()).unwrap();
    let other = dir.path().join("other");
    fs::write(&other, []).unwrap();
    let permissions = |path: &Path| fs::metadata(path).unwrap().permissions();
    assert_eq!(permissions(&path), permissions(&other));
}

#[test]
fn only_whole_checkpoints_are_found() {
    let dir = TempDir::new().unwrap();
    let (path, last) = (dir.path().join("checkpoint"), || last_checkpoint(dir.path()).unwrap());
    assert_eq!(last(), None);
    fs::create_dir(&path).unwrap();
    // The smallest file of MessagePack.
    let touch =
        |names: &[&str]| names.iter().for_each(|it| fs::write(path.join(it), [0xc0]).unwrap());
    touch(&["model-9.mpk", "optim-9.mpk", "scheduler-9.mpk"]);
    touch(&["model-10.mpk", "scheduler-10.mpk"]);
    fs::create_dir(path.join(".unfinished-")).unwrap();
    touch(&[".unfinished-/optim-10.mpk"]);
    touch(&["model-11.mpk", "model-11.bin", "optim-11.mpk", "notes-11.mpk"]);
    touch(&["model-best.mpk", "README"]);
    assert_eq!(last(), Some(9));
    touch(&["optim-10.mpk"]);
    assert_eq!(last(), Some(10));
    // A full disk leaves empty files.
    touch(&["model-12.mpk", "optim-12.mpk", "model-13.bin", "optim-13.bin", "scheduler-13.bin"]);
    fs::write(path.join("scheduler-12.mpk"), []).unwrap();
    fs::write(path.join("model-13.bin"), []).unwrap();
    assert_eq!(last(), Some(10));
    touch(&["model-13.bin"]);
    assert_eq!(last(), Some(13));
}

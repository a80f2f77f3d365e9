//! Threads that share short work, many times a second.
//!
//! A step of a decoder has some hundred products, each of which takes some ten microseconds on two cores. To wake a
//! sleeping thread takes as long. So the threads of a team look for work for a while before they sleep.

use std::{
    any::Any,
    hint, mem,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, TryLockError,
        atomic::{
            AtomicU32, AtomicUsize,
            Ordering::{Acquire, Relaxed, Release, SeqCst},
        },
    },
    thread::{self, Thread},
};

/// How often a thread looks for work before it sleeps: about half a millisecond.
const LOOKS: u32 = 10_000;

/// How often the caller looks whether the others are done before it lets other threads run.
const PATIENCE: u32 = 2_000;

/// Threads that share work with the one that has it.
///
/// ```
/// use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
///
/// use burn_lora_kernels::Team;
///
/// let (team, sum) = (Team::new(1), AtomicUsize::new(0));
/// team.run(100, |index| {
///     sum.fetch_add(index, Relaxed);
/// });
/// assert_eq!(sum.into_inner(), 4950);
/// ```
#[derive(Debug)]
pub struct Team {
    shared: Arc<Shared>,
    threads: Vec<Thread>,
    /// Held while there is work.
    leader: Mutex<()>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Changes with each work. The lowest bit is set once the team has ended.
    round: AtomicU32,
    /// The next index.
    next: AtomicUsize,
    /// The threads that do the work. A thread becomes one of them while it holds the lock of the work.
    busy: AtomicUsize,
    /// The threads that sleep, or are about to.
    sleeping: AtomicUsize,
    /// `None` as soon as nobody may begin with it any more.
    work: Mutex<Option<Work>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// A closure of [`Team::run`], which waits until no thread can call it any more, and how many indices it is called with.
#[derive(Clone, Copy, Debug)]
struct Work {
    data: *const (),
    call: unsafe fn(*const (), usize),
    count: usize,
}

// SAFETY: it is made of a reference to a closure that is `Sync`.
unsafe impl Send for Work {}

impl Team {
    /// A team of so many threads besides the one that has work. They end with the team.
    ///
    /// # Panics
    ///
    /// If the system gives no more threads.
    pub fn new(others: usize) -> Self {
        let shared = Arc::new(Shared::default());
        let threads = (0..others).map(|number| {
            let shared = shared.clone();
            let builder = thread::Builder::new().name(format!("team-{number}"));
            let handle = builder.spawn(move || shared.help()).expect("the system gives threads");
            handle.thread().clone()
        });
        let threads = threads.collect();
        Self { shared, threads, leader: Mutex::default() }
    }

    /// The number of threads, with the one that has work.
    pub fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Calls `work` with each number below `count`, on all threads, and returns when it is done. Threads that are late are
    /// not waited for. If the team has other work, this thread does it alone.
    ///
    /// # Panics
    ///
    /// If a call panics. Work that is shared is done by then, but for that call.
    pub fn run<F: Fn(usize) + Sync>(&self, count: usize, work: F) {
        /// # Safety
        ///
        /// `data` is a reference to an `F`.
        unsafe fn call<F: Fn(usize)>(data: *const (), index: usize) {
            // SAFETY: as above.
            unsafe { (*data.cast::<F>())(index) }
        }
        let leader = match self.leader.try_lock() {
            _ if count < 2 || self.threads.is_empty() => return (0..count).for_each(work),
            Ok(leader) => leader,
            Err(TryLockError::Poisoned(leader)) => leader.into_inner(),
            Err(TryLockError::WouldBlock) => return (0..count).for_each(work),
        };
        let (shared, work) =
            (&*self.shared, Work { data: (&raw const work).cast(), call: call::<F>, count });
        shared.next.store(0, Relaxed);
        *lock(&shared.work) = Some(work);
        shared.round.fetch_add(2, SeqCst);
        if shared.sleeping.load(SeqCst) > 0 {
            self.threads.iter().for_each(Thread::unpark);
        }
        shared.take(work);
        // Nobody may hold the closure when this returns.
        *lock(&shared.work) = None;
        let mut looks = 0;
        while shared.busy.load(Acquire) > 0 {
            looks += 1;
            if looks < PATIENCE { hint::spin_loop() } else { thread::yield_now() }
        }
        let panic = lock(&shared.panic).take();
        drop(leader);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.round.fetch_or(1, SeqCst);
        self.threads.iter().for_each(Thread::unpark);
    }
}

impl Shared {
    /// What another thread does until the team ends.
    fn help(&self) {
        let mut seen = 0;
        loop {
            seen = self.wait(seen);
            if seen & 1 == 1 {
                return;
            }
            let work = lock(&self.work);
            let Some(begun) = *work else { continue };
            self.busy.fetch_add(1, Relaxed);
            drop(work);
            self.take(begun);
            self.busy.fetch_sub(1, Release);
        }
    }

    /// Another round than the one that was seen.
    fn wait(&self, seen: u32) -> u32 {
        let other = || Some(self.round.load(SeqCst)).filter(|it| *it != seen);
        for _ in 0..LOOKS {
            if let Some(round) = other() {
                return round;
            }
            hint::spin_loop();
        }
        self.sleeping.fetch_add(1, SeqCst);
        let round = loop {
            match other() {
                Some(round) => break round,
                None => thread::park(),
            }
        };
        self.sleeping.fetch_sub(1, SeqCst);
        round
    }

    /// Does what is left of the work.
    fn take(&self, Work { data, call, count }: Work) {
        loop {
            let index = self.next.fetch_add(1, Relaxed);
            if index >= count {
                return;
            }
            // SAFETY: the closure is there. This is the thread that has it, or `Team::run` waits until this one is not busy.
            let done = catch_unwind(AssertUnwindSafe(|| unsafe { call(data, index) }));
            if let Err(panic) = done {
                let mut first = lock(&self.panic);
                match *first {
                    None => *first = Some(panic),
                    // To drop it may panic in turn, while others still call the closure.
                    Some(_) => mem::forget(panic),
                }
            }
        }
    }
}

/// A panic of work is kept apart, so nothing is left half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

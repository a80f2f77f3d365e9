//! Work that is shared among the threads of a team.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use burn_lora_kernels::Team;

/// Each index is called once, and what calls wrote is there when `run` returns.
fn assert_runs(team: &Team, count: usize) {
    let numbers: Vec<_> = (0..count).map(|_| Mutex::new(0)).collect();
    team.run(count, |index| *numbers[index].lock().unwrap() += index + 1);
    for (index, number) in numbers.into_iter().enumerate() {
        assert_eq!(number.into_inner().unwrap(), index + 1);
    }
}

#[test]
fn every_index_is_called_once() {
    for others in [0, 1, 3] {
        let team = Team::new(others);
        assert_eq!(team.threads(), others + 1);
        for _ in 0..300 {
            for count in [0, 1, 2, 3, 7, 100] {
                assert_runs(&team, count);
            }
        }
    }
}

#[test]
fn threads_that_sleep_are_woken() {
    let team = Team::new(2);
    for _ in 0..5 {
        thread::sleep(Duration::from_millis(20));
        assert_runs(&team, 50);
    }
}

/// A team that has other work does not keep anybody waiting.
#[test]
fn several_threads_can_have_work_at_once() {
    let (team, sum) = (Team::new(1), AtomicUsize::new(0));
    let add = |to: &AtomicUsize, index| {
        to.fetch_add(index, Relaxed);
    };
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..500 {
                    team.run(10, |index| add(&sum, index));
                }
            });
        }
    });
    assert_eq!(sum.into_inner(), 4 * 500 * 45);
    // Work within work.
    let sum = AtomicUsize::new(0);
    team.run(5, |_| team.run(4, |index| add(&sum, index)));
    assert_eq!(sum.into_inner(), 5 * 6);
}

#[test]
fn a_panic_reaches_the_thread_that_has_the_work() {
    let team = Team::new(2);
    for _ in 0..20 {
        let calls = AtomicUsize::new(0);
        let run = || {
            team.run(30, |index| {
                calls.fetch_add(1, Relaxed);
                assert!(index != 17, "the seventeenth");
            });
        };
        let panic = catch_unwind(AssertUnwindSafe(run)).unwrap_err();
        assert!(panic.downcast_ref::<&str>().unwrap().contains("the seventeenth"));
        assert_eq!(calls.into_inner(), 30);
        assert_runs(&team, 30);
    }
}

//! Any number of threads computes the same.

use crate::oracle::{Factors, HELD, assert_near, random, there};

#[test]
fn any_number_of_threads_gives_the_same_to_the_bit() {
    let mut random = random(7);
    // Many rows, many columns, many of both, a long sum, and a left factor that is itself packed by several threads.
    for dims @ [_, inner, _] in
        [[2100, 33, 16], [2, 40, 14000], [200, 33, 170], [33, 1100, 31], [270, 250, 17]]
    {
        let factors = Factors::fractions(dims, &mut random);
        let expected = factors.expected();
        for by in there() {
            for held in HELD {
                let mut first: Option<Vec<u32>> = None;
                for threads in [1, 2, 3, 5] {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                    let found = pool.unwrap().install(|| factors.multiply(by, held));
                    let what = format!("{dims:?} by {by}, {held:?}, {threads} threads");
                    let bits: Vec<_> = found.iter().map(|it| it.to_bits()).collect();
                    match &first {
                        Some(first) => assert!(*first == bits, "{what}"),
                        None => {
                            assert_near(&found, &expected, inner, &what);
                            first = Some(bits);
                        }
                    }
                }
            }
        }
    }
}

//! The pool of threads that products share.

/// From this number of multiplications on, a product uses several threads.
pub(super) const SHARED: usize = 192 * 192 * 192;

/// Runs `work` on a thread of rayon's pool if its products are large enough for `flex` to use that pool.
/// If `work` ran on another thread, each product would enter the pool by itself, and the pool's threads
/// would wake and stop for each product.
pub(super) fn in_pool<R: Send>(
    batch: usize,
    [d_input, d_output]: [usize; 2],
    work: impl FnOnce() -> R + Send,
) -> R {
    let shared = batch * d_input * d_output >= SHARED && rayon::current_num_threads() > 1;
    match shared {
        true => rayon::scope(|_| work()),
        false => work(),
    }
}

//! What the examples share, tested where unit tests cannot.

mod resuming;

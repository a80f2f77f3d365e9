//! Tests of what the examples with spoken digits share, and of the split.

mod files;
mod sounds;
mod split;

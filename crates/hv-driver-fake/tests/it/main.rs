//! The fake against the conformance suite, and its own promises.

mod conformance;
mod moving;
mod script;

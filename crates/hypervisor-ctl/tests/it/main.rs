//! Runs the real program against a fake server: the service traits over a tiny model in memory.

mod apply;
mod changes;
mod console;
mod errors;
mod fake;
mod images;
mod operators;
mod program;
mod reading;
#[cfg(unix)]
mod terminal;
mod tree;

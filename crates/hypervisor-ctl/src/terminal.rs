//! The user's terminal: raw mode that is undone on every way out, size, signals.

#[cfg(not(unix))]
mod other;
#[cfg(unix)]
mod unix;

#[cfg(not(unix))]
pub(crate) use other::{RawMode, Resized, ended_by_signal, size};
#[cfg(unix)]
pub(crate) use unix::{RawMode, Resized, ended_by_signal, size};

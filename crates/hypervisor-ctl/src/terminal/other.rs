//! Terminals of platforms without termios: lines only.

use crate::error::CtlError;

/// Cannot be had here.
#[derive(Debug)]
pub(crate) struct RawMode;

impl RawMode {
    pub(crate) fn enter() -> Result<Self, CtlError> {
        Err(CtlError::Usage("this platform's terminal cannot be put into raw mode; add --no-raw".to_owned()))
    }
}

/// Never.
#[derive(Debug)]
pub(crate) struct Resized;

impl Resized {
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self)
    }

    pub(crate) async fn next(&mut self) -> bool {
        false
    }
}

/// Not known.
pub(crate) fn size() -> Option<(u16, u16)> {
    None
}

/// The number of the signal that asks to end.
pub(crate) async fn ended_by_signal() -> u8 {
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
    }
    2
}

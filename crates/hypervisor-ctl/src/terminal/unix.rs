//! Terminals by termios (POSIX.1-2017, chapter 11).

use std::io;
use std::sync::{Mutex, Once, PoisonError};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::error::CtlError;

/// How the terminal was before raw mode. The panic hook needs it: a release build aborts without running destructors.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);
static HOOK: Once = Once::new();

/// Raw mode of the terminal at standard input, until it is dropped or the program panics.
#[derive(Debug)]
pub(crate) struct RawMode(());

impl RawMode {
    /// Every key goes through as it is, including those that would raise signals.
    pub(crate) fn enter() -> Result<Self, CtlError> {
        let failed = |source: rustix::io::Errno| CtlError::Stream {
            action: "put the terminal into raw mode",
            source: source.into(),
        };
        let before = tcgetattr(io::stdin()).map_err(failed)?;
        HOOK.call_once(|| {
            let next = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                restore();
                next(panic);
            }));
        });
        let mut raw = before.clone();
        raw.make_raw();
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        let entered = Self(());
        tcsetattr(io::stdin(), OptionalActions::Now, &raw).map_err(failed)?;
        Ok(entered)
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    // A panic while the lock is held must not wait for it for ever.
    let before = BEFORE.try_lock().ok().and_then(|mut before| before.take());
    if let Some(before) = before {
        // Nothing can be done about a terminal that has gone away.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &before);
    }
}

/// Columns and rows, where standard output or input is a terminal.
pub(crate) fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(io::stdout()).or_else(|_| tcgetwinsize(io::stdin())).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// Tells when the terminal has another size.
#[derive(Debug)]
pub(crate) struct Resized(Signal);

impl Resized {
    pub(crate) fn new() -> io::Result<Self> {
        signal(SignalKind::window_change()).map(Self)
    }

    /// False when it will never tell again.
    pub(crate) async fn next(&mut self) -> bool {
        self.0.recv().await.is_some()
    }
}

/// The number of the signal that asks to end.
pub(crate) async fn ended_by_signal() -> u8 {
    let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup(), SignalKind::quit()];
    let arrivals = kinds.into_iter().map(|kind| {
        Box::pin(async move {
            match signal(kind) {
                Ok(mut arrivals) => arrivals.recv().await,
                Err(_) => std::future::pending().await,
            };
            u8::try_from(kind.as_raw_value()).unwrap_or_default()
        })
    });
    futures::future::select_all(arrivals).await.0
}

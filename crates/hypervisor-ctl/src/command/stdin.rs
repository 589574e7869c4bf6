//! Sends standard input, and the terminal's size, into a stream.

use bytes::Bytes;
use hv_proto::v1::TerminalSize;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc::Sender;

use crate::terminal;

/// Messages that wait to be sent.
pub(super) const QUEUE: usize = 64;
/// Most bytes of one message.
const CHUNK_BYTES: usize = 16 << 10;

/// Why standard input is no longer read.
#[derive(Debug)]
pub(super) enum End {
    /// It ended.
    Eof,
    /// The user pressed the key that detaches.
    Detached,
    /// It cannot be read.
    Failed(std::io::Error),
}

/// Sends what is typed until standard input ends, the key that detaches is pressed, or nobody takes it any more. It is a
/// task of its own, so that output flows while the other side takes no input.
pub(super) async fn forward<T>(sender: Sender<T>, message: fn(Bytes) -> T, detach: Option<u8>) -> End {
    let mut stdin = tokio::io::stdin();
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        let typed = match stdin.read(&mut buffer).await {
            Ok(0) => return End::Eof,
            Ok(count) => &buffer[..count],
            Err(error) => return End::Failed(error),
        };
        let key_at = detach.and_then(|key| typed.iter().position(|byte| *byte == key));
        let before = Bytes::copy_from_slice(&typed[..key_at.unwrap_or(typed.len())]);
        if !before.is_empty() && sender.send(message(before)).await.is_err() {
            return End::Eof;
        }
        if key_at.is_some() {
            return End::Detached;
        }
    }
}

/// Sends the terminal's size each time it changes.
pub(super) async fn forward_sizes<T>(sender: Sender<T>, message: fn(TerminalSize) -> T) {
    let Ok(mut resized) = terminal::Resized::new() else { return };
    while resized.next().await {
        if let Some(size) = size()
            && sender.send(message(size)).await.is_err()
        {
            return;
        }
    }
}

/// The terminal's size as the wire carries it.
pub(super) fn size() -> Option<TerminalSize> {
    terminal::size().map(|(width, height)| TerminalSize { width: width.into(), height: height.into() })
}

//! `instance exec`.

use std::io::{IsTerminal, Write};

use bytes::Bytes;
use hv_proto::v1::{self, exec_input, exec_output};
use hv_types::InstanceType;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

use super::Context;
use super::console::finished;
use super::stdin::{self, End, QUEUE};
use crate::cli::ExecArgs;
use crate::cli::value::map_of;
use crate::error::CtlError;
use crate::output::write_stdout;
use crate::reference;
use crate::terminal::{self, RawMode};

pub(super) async fn run(
    context: &Context,
    only: Option<InstanceType>,
    args: &ExecArgs,
) -> Result<u8, CtlError> {
    let server = &context.server;
    let on_terminal = std::io::stdin().is_terminal();
    if args.tty && !on_terminal {
        return Err(CtlError::Usage("--tty needs a terminal at standard input; leave it out".to_owned()));
    }
    let target = reference::instance(server, only, &args.name).await?;
    let tty = if args.tty {
        Some(stdin::size().unwrap_or(v1::TerminalSize { width: 80, height: 24 }))
    } else {
        None
    };
    let start =
        v1::ExecStart { instance_id: target.id, command: args.command.clone(), env: map_of(&args.env), tty };
    let (sender, receiver) = mpsc::channel(QUEUE);
    // The queue is empty: there is room for both.
    let _ = sender.try_send(message(exec_input::Input::Start(start)));
    if !args.stdin {
        let _ = sender.try_send(message(exec_input::Input::Eof(true)));
    }
    let raw = if args.tty && args.stdin { Some(RawMode::enter()?) } else { None };
    // Before the answer is awaited: a server may answer only once it has read something.
    let mut input = args.stdin.then(|| tokio::spawn(stdin::forward(sender.clone(), typed, None)));
    let sizes = args.tty.then(|| tokio::spawn(stdin::forward_sizes(sender.clone(), resized)));
    let code = relay(context, ReceiverStream::new(receiver), &sender, &mut input).await;
    drop(raw);
    if let Some(sizes) = sizes {
        sizes.abort();
    }
    if let Some(input) = input {
        input.abort();
    }
    code
}

/// Prints what the command prints until it ends.
async fn relay(
    context: &Context,
    messages: ReceiverStream<v1::ExecInput>,
    sender: &mpsc::Sender<v1::ExecInput>,
    input: &mut Option<JoinHandle<End>>,
) -> Result<u8, CtlError> {
    let signal = terminal::ended_by_signal();
    tokio::pin!(signal);
    let opening = async { context.server.compute().exec(messages).await };
    tokio::pin!(opening);
    let mut output = None;
    loop {
        tokio::select! {
            opened = &mut opening, if output.is_none() => {
                let opened = opened.map_err(|status| context.server.error(&status))?;
                output = Some(opened.into_inner());
            }
            printed = next(&mut output) => match printed {
                Ok(Some(printed)) => if let Some(code) = print(printed)? { return Ok(code) },
                Ok(None) => {
                    return Err(CtlError::Ended("the server ended the stream without an exit code".to_owned()));
                }
                Err(status) => return Err(context.server.error(&status)),
            },
            end = finished(input) => match end {
                // The task has ended, so nothing else fills the queue: there is room soon.
                End::Eof | End::Detached => {
                    let sender = sender.clone();
                    tokio::spawn(async move { sender.send(message(exec_input::Input::Eof(true))).await });
                }
                End::Failed(source) => return Err(CtlError::Stream { action: "read standard input", source }),
            },
            number = &mut signal => return Err(CtlError::Signal(number)),
        }
    }
}

/// Nothing until the stream is there.
async fn next(
    output: &mut Option<tonic::Streaming<v1::ExecOutput>>,
) -> Result<Option<v1::ExecOutput>, tonic::Status> {
    match output {
        Some(output) => output.message().await,
        None => std::future::pending().await,
    }
}

fn print(printed: v1::ExecOutput) -> Result<Option<u8>, CtlError> {
    match printed.output {
        Some(exec_output::Output::Stdout(bytes)) => write_stdout(&bytes)?,
        Some(exec_output::Output::Stderr(bytes)) => std::io::stderr()
            .write_all(&bytes)
            .map_err(|source| CtlError::Stream { action: "write to standard error", source })?,
        // An exit code has eight bits (POSIX.1-2017, `_exit`).
        Some(exec_output::Output::ExitCode(code)) => {
            return Ok(Some(u8::try_from(code & 0xff).unwrap_or(u8::MAX)));
        }
        None => {}
    }
    Ok(None)
}

fn message(input: exec_input::Input) -> v1::ExecInput {
    v1::ExecInput { input: Some(input) }
}

fn typed(data: Bytes) -> v1::ExecInput {
    message(exec_input::Input::Stdin(data))
}

fn resized(size: v1::TerminalSize) -> v1::ExecInput {
    message(exec_input::Input::Resize(size))
}

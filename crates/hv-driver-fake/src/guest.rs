//! What goes on inside a "running" instance: a console that echoes, and a handful of commands.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use hv_driver::{Console, DriverError, Exec, ExecOutput, ExecRequest, Input, LogRequest, Result, log};
use hv_types::InstanceId;
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::ReceiverStream;

use crate::record::Phase;
use crate::{CONSOLE_QUEUE, Shared, not_running};

/// How many pieces of input wait for the guest.
const INPUT_QUEUE: usize = 64;
/// How much `cat` passes on before it ends.
const MAX_CAT_BYTES: usize = 16 << 20;

/// What was printed, and what will be; taken together so that nothing is lost or doubled in between.
fn attach(
    shared: &Shared,
    id: &InstanceId,
    what: &'static str,
) -> Result<(Vec<u8>, Option<broadcast::Receiver<Bytes>>)> {
    let mut live = shared.live.lock();
    let record = shared.settled(&mut live, id, what)?;
    let history = shared.files.printed(id).map_err(|e| DriverError::failed(id, what, e))?;
    let runs = matches!(record.phase, Phase::Running { .. } | Phase::Paused { .. });
    let receiver = runs
        .then(|| live.entry(id.clone()).or_insert_with(|| broadcast::channel(CONSOLE_QUEUE).0).subscribe());
    Ok((history, receiver))
}

fn until_closed(receiver: broadcast::Receiver<Bytes>) -> BoxStream<'static, Result<Bytes>> {
    stream::unfold(receiver, |mut receiver| async {
        loop {
            match receiver.recv().await {
                Ok(bytes) => return Some((Ok(bytes), receiver)),
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    })
    .boxed()
}

pub(crate) fn console(shared: &Arc<Shared>, id: &InstanceId) -> Result<Console> {
    let (history, receiver) = attach(shared, id, "console")?;
    let receiver = receiver.ok_or_else(|| not_running(id, "console"))?;
    let (input, mut typed) = mpsc::channel(INPUT_QUEUE);
    let (shared, id) = (Arc::downgrade(shared), id.clone());
    tokio::spawn(async move {
        while let Some(input) = typed.recv().await {
            let (Input::Data(bytes), Some(shared)) = (input, shared.upgrade()) else { continue };
            let mut live = shared.live.lock();
            let echoes = matches!(shared.settled(&mut live, &id, "console"), Ok(r) if matches!(r.phase, Phase::Running { .. }));
            if !echoes || shared.print(&mut live, &id, &bytes).is_err() {
                return;
            }
        }
    });
    let history = stream::iter((!history.is_empty()).then(|| Ok(Bytes::from(history))));
    Ok(Console { output: history.chain(until_closed(receiver)).boxed(), input })
}

pub(crate) fn logs(
    shared: &Shared,
    id: &InstanceId,
    request: LogRequest,
) -> Result<BoxStream<'static, Result<Bytes>>> {
    let (history, receiver) = attach(shared, id, "logs")?;
    let wanted = match request.tail_lines {
        Some(lines) => log::last_lines(&history, lines).to_vec(),
        None => history,
    };
    let history = stream::iter((!wanted.is_empty()).then(|| Ok(Bytes::from(wanted))));
    Ok(match receiver {
        Some(receiver) if request.follow => history.chain(until_closed(receiver)).boxed(),
        _ => history.boxed(),
    })
}

pub(crate) fn exec(request: ExecRequest, env: &BTreeMap<String, String>) -> Exec {
    let (input, typed) = mpsc::channel(INPUT_QUEUE);
    let (output, printed) = mpsc::channel(INPUT_QUEUE);
    let mut variables = env.clone();
    variables.extend(request.env);
    let command = request.command;
    tokio::spawn(async move {
        let work = run(&command, &variables, typed, &output);
        let code = tokio::select! {
            code = work => code,
            // Nobody reads any more: the command ends, as the contract says.
            () = output.closed() => return,
        };
        let _ = output.send(Ok(ExecOutput::Exited { code })).await;
    });
    Exec { output: ReceiverStream::new(printed).boxed(), input }
}

type Output = mpsc::Sender<Result<ExecOutput>>;

async fn run(
    command: &[String],
    env: &BTreeMap<String, String>,
    input: mpsc::Receiver<Input>,
    out: &Output,
) -> i32 {
    let words: Vec<_> = command.iter().map(String::as_str).collect();
    let print = async |text: String| {
        let _ = out.send(Ok(ExecOutput::Stdout(text.into()))).await;
    };
    match words.as_slice() {
        ["echo", rest @ ..] => {
            print(format!("{}\n", rest.join(" "))).await;
            0
        }
        ["env"] => {
            print(env.iter().map(|(name, value)| format!("{name}={value}\n")).collect()).await;
            0
        }
        ["true"] => 0,
        ["false"] => 1,
        ["exit", code] => code.parse().unwrap_or(2),
        ["sleep", seconds] => {
            tokio::time::sleep(Duration::from_secs(seconds.parse().unwrap_or(0))).await;
            0
        }
        ["cat"] => cat(input, out).await,
        _ => {
            let text = format!("{}: not found\n", words.first().copied().unwrap_or_default());
            let _ = out.send(Ok(ExecOutput::Stderr(text.into()))).await;
            127
        }
    }
}

async fn cat(mut input: mpsc::Receiver<Input>, out: &Output) -> i32 {
    let mut passed = 0;
    while let Some(input) = input.recv().await {
        match input {
            Input::Data(bytes) if passed + bytes.len() <= MAX_CAT_BYTES => {
                passed += bytes.len();
                let _ = out.send(Ok(ExecOutput::Stdout(bytes))).await;
            }
            Input::Data(_) | Input::Eof => break,
            Input::Resize(_) => {}
        }
    }
    0
}

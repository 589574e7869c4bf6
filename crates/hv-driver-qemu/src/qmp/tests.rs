//! The client against a server that misbehaves.

use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};

use super::*;

const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\n";

/// A server that greets, then answers each line with what `answer` makes of it.
async fn served(answer: impl Fn(&Value) -> String + Send + 'static) -> Outcome<Qmp> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    tokio::spawn(async move {
        let mut stream = BufReader::new(theirs);
        stream.get_mut().write_all(GREETING.as_bytes()).await.unwrap();
        let mut line = String::new();
        while stream.read_line(&mut line).await.is_ok_and(|length| length > 0) {
            let text = answer(&serde_json::from_str(&line).unwrap());
            line.clear();
            if text.is_empty() || stream.get_mut().write_all(text.as_bytes()).await.is_err() {
                return;
            }
        }
    });
    Qmp::over(ours, CancellationToken::new()).await
}

fn echo(request: &Value) -> String {
    format!("{}\n", json!({ "return": request["arguments"], "id": request["id"] }))
}

const SOON: Duration = Duration::from_millis(200);

#[tokio::test]
async fn answers_find_those_who_asked_between_events() {
    let qmp = served(|request| format!("{{\"event\": \"STOP\"}}\n{}", echo(request))).await.unwrap();
    let asked = (0..20).map(|n| qmp.command("x", Some(json!({ "n": n })), SOON));
    for (n, answer) in futures::future::join_all(asked).await.into_iter().enumerate() {
        assert_eq!(answer.unwrap()["n"], n);
    }
}

#[tokio::test]
async fn a_refusal_carries_its_reason() {
    let qmp = served(|request| match request["execute"].as_str() {
        Some("qmp_capabilities") => echo(request),
        _ => format!(
            "{}\n",
            json!({ "error": { "class": "X", "desc": "no such thing" }, "id": request["id"] })
        ),
    });
    let error = qmp.await.unwrap().command("x", None, SOON).await.unwrap_err();
    assert!(matches!(&error, Problem::Refused { reason, .. } if reason == "no such thing"), "{error}");
}

#[tokio::test]
async fn silence_and_hanging_up_are_errors_not_hangs() {
    let silent = served(|request| match request["execute"].as_str() {
        Some("qmp_capabilities") => echo(request),
        _ => "{\"event\": \"STOP\"}\n".to_owned(),
    });
    assert!(matches!(silent.await.unwrap().command("x", None, SOON).await, Err(Problem::Timeout { .. })));
    let gone = served(|request| match request["execute"].as_str() {
        Some("qmp_capabilities") => echo(request),
        _ => String::new(),
    });
    assert!(matches!(gone.await.unwrap().command("x", None, SOON).await, Err(Problem::Disconnected(_))));
}

#[tokio::test]
async fn what_is_no_qmp_is_refused() {
    for text in ["hello\n", "{}\n", "{\"QMP\": ", ""] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(text.as_bytes()).await.unwrap();
        drop(theirs);
        assert!(Qmp::over(ours, CancellationToken::new()).await.is_err(), "{text:?}");
    }
}

#[tokio::test]
async fn a_line_without_end_is_not_collected_for_ever() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let flood = tokio::spawn(async move {
        let piece = vec![b'x'; 64 << 10];
        while theirs.write_all(&piece).await.is_ok() {}
    });
    assert!(Qmp::over(ours, CancellationToken::new()).await.is_err());
    tokio::time::timeout(Duration::from_secs(10), flood).await.expect("the connection was given up").unwrap();
}

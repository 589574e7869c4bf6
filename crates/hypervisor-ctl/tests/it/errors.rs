//! What goes wrong: exit codes, messages, settings.

use crate::fake::Fake;
use crate::program::{alone, command, ctl};

fn closed_port() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    format!("127.0.0.1:{}", listener.local_addr().unwrap().port())
}

#[test]
fn an_unreachable_server_is_named_with_what_to_do() {
    let server = closed_port();
    let error = alone(&["node", "list", "--server", &server]).failed(6);
    assert!(
        error.contains(&format!("cannot reach hypervisor-server at http://{server}: connection refused")),
        "{error}"
    );
    assert!(error.contains("--server"), "{error}");
}

#[test]
fn json_errors_are_one_object_with_code_message_and_request_id() {
    let fake = Fake::start();
    let error = ctl(&fake, &["instance", "get", "nobody", "-o", "json"]).failed(3);
    let error: serde_json::Value = serde_json::from_str(&error).unwrap();
    assert_eq!(error["error"]["code"], "NOT_FOUND");
    assert!(error["error"]["message"].as_str().unwrap().contains("nobody"));

    let create = ["vm", "create", "UPPER", "--image", "x", "-o", "json", "--request-id", "abc"];
    let error: serde_json::Value = serde_json::from_str(&ctl(&fake, &create).failed(2)).unwrap();
    assert_eq!(
        (&error["error"]["code"], &error["error"]["request_id"]),
        (&"INVALID_ARGUMENT".into(), &"abc".into())
    );
    assert!(fake.model.lock().request_ids.iter().any(|id| id == "abc"));

    let error = alone(&["instance", "frobnicate", "-o", "json"]).failed(2);
    let error: serde_json::Value = serde_json::from_str(&error).unwrap();
    assert_eq!(error["error"]["code"], "INVALID_ARGUMENT");
}

#[test]
fn bad_values_are_refused_with_the_flag_and_what_is_expected() {
    for (arguments, parts) in [
        (&["--cpus", "0"][..], ["--cpus", "1..=4096"]),
        (&["--cpus", "-1"], ["--cpus", "1..=4096"]),
        (&["--memory", "0"], ["--memory", "at least 4MiB"]),
        (&["--memory", "-5"], ["--memory", "512MiB"]),
        (&["--memory", "1GB"], ["--memory", "GiB"]),
        (&["--disk", "name=x"], ["--disk", "name=data,size=10GiB"]),
        (&["--label", "novalue"], ["--label", "key=value"]),
        (&["--node-selector", "a!=b"], ["--node-selector", "key=value"]),
        (&["--timeout", "5"], ["--timeout", "10s"]),
        (&["--type", "jail"], ["--type", "microvm"]),
    ] {
        let error = alone(&[&["instance", "create", "x", "--image", "i"], arguments].concat()).failed(2);
        assert!(parts.iter().all(|part| error.contains(part)), "{arguments:?}: {error}");
    }
    let error = alone(&["instance", "create", "x", "--image", "i"]).failed(2);
    assert!(error.contains("--type vm"), "{error}");
    alone(&["vm", "create", "x"]).failed(2);
    alone(&["vm", "create", "--image", "i"]).failed(2);
}

#[test]
fn a_name_of_ten_megabytes_is_refused_in_one_readable_line() {
    // An argument is bounded by the system (Linux: 128 KiB each), a file is not.
    let fake = Fake::start();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("long.yaml");
    std::fs::write(&file, format!("kind: Instance\nname: {}\n", "x".repeat(3 << 20))).unwrap();
    let error = ctl(&fake, &["apply", "-f", file.to_str().unwrap()]).failed(2);
    assert!(error.contains("name must have 1 to 63") && error.len() < 400, "{} bytes", error.len());
    std::fs::write(&file, format!("kind: Instance\nname: {}\n", "x".repeat(10 << 20))).unwrap();
    let error = ctl(&fake, &["apply", "-f", file.to_str().unwrap()]).failed(2);
    assert!(error.contains("has more than 4 MiB"), "{} bytes", error.len());

    let error = ctl(&fake, &["instance", "get", &"x".repeat(100_000)]).failed(3);
    assert!(error.len() < 400, "{} bytes", error.len());
}

#[test]
fn flags_win_over_the_environment_and_that_over_the_file() {
    let home = tempfile::tempdir().unwrap();
    let directory = home.path().join(".config/hypervisor");
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("ctl.yaml"), "ctl:\n  server: file:1\n  output: json\n  timeout: 7s\n")
        .unwrap();
    let show = |variables: &[(&str, &str)], arguments: &[&str]| {
        let mut command = command();
        command
            .env("HOME", home.path())
            .envs(variables.iter().copied())
            .args(["config", "show"])
            .args(arguments);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let line = |text: &str, key: &str| text.lines().find(|line| line.starts_with(key)).unwrap().to_owned();
    let text = show(
        &[("HYPERVISOR_CTL_SERVER", "env:1"), ("HYPERVISOR_SERVER_GRPC_ADDRESS", ":1")],
        &["--timeout", "9s"],
    );
    assert!(line(&text, "ctl.server").contains("env:1"), "{text}");
    assert!(
        line(&text, "ctl.timeout").contains("9s") && line(&text, "ctl.timeout").contains("--timeout"),
        "{text}"
    );
    assert!(line(&text, "ctl.output").contains("ctl.yaml:3"), "{text}");
    assert!(line(&show(&[("HYPERVISOR_SERVER", "short:1")], &[]), "ctl.server").contains("short:1"));
    assert!(line(&show(&[], &[]), "ctl.server").contains("file:1"));
}

#[test]
fn mistakes_in_settings_are_named_with_their_place() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("ctl.yaml");
    let run = |text: &str| {
        std::fs::write(&file, text).unwrap();
        alone(&["node", "list", "--config", file.to_str().unwrap()]).failed(2)
    };
    let error = run("ctl:\n  sever: a:1\n");
    assert!(error.contains("ctl.yaml:2") && error.contains("did you mean \"ctl.server\""), "{error}");
    let error = run("ctl:\n  timeout: 5\n");
    assert!(error.contains("ctl.yaml:2: ctl.timeout"), "{error}");
    let error = run("ctl:\n  tls:\n    cert_file: c.pem\n");
    assert!(error.contains("key_file"), "{error}");
    assert!(run("ctl: [\n").contains("ctl.yaml:"));
    alone(&["node", "list", "--config", "/nonexistent.yaml"]).failed(2);
    let error = alone(&["node", "list", "--server", "a b"]).failed(2);
    assert!(error.contains("expected host:port"), "{error}");
    let unknown = command().args(["node", "list"]).env("HYPERVISOR_CTL_SEVER", "x").output().unwrap();
    assert_eq!(unknown.status.code(), Some(2));
}

#[test]
fn a_server_that_speaks_no_grpc_is_a_clear_error() {
    use std::io::{Read, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let answering = std::thread::spawn(move || {
        // As often as a call is tried.
        for stream in listener.incoming().take(1) {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
        }
    });
    let ran = alone(&["node", "list", "--server", &address, "--timeout", "5s"]);
    answering.join().unwrap();
    assert_ne!(ran.code, 0);
    assert!(ran.stderr.starts_with("error: ") && ran.stderr.len() < 600, "{ran:?}");
}

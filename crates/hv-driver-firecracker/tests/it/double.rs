//! A double of Firecracker's API, for machines without KVM and for speed. It is not Firecracker: it holds requests
//! against the contract (`src/api/contract.txt`), keeps the order in which they may come, and plays the suite's guest.
//!
//! It is this test binary, started through a script by the name of `firecracker` as a process of its own.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use serde_json::{Value, json};

use crate::subject::{GREETING, RESCUE_GREETING};

const CONTRACT: &str = include_str!("../../src/api/contract.txt");
/// Tells the test that it is the double, and what its arguments are.
const ARGUMENTS: &str = "HV_FIRECRACKER_DOUBLE";
/// How long its socket is there before it accepts.
const ACCEPT_DELAY: Duration = Duration::from_millis(20);
/// How long the guest may take from one count to the next.
const COUNT_INTERVAL: Duration = Duration::from_millis(1);

/// Puts the double where it can be started, and says where.
pub(crate) fn install(near: &Path) -> PathBuf {
    let dir = near.join(".double");
    fs::create_dir_all(&dir).unwrap();
    let path = dir.join("firecracker");
    // The test harness talks on standard output, which is the guest's: that goes on as descriptor 3.
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = --version ] && echo 'Firecracker v1.12.1' && exit 0\n{ARGUMENTS}=\"$*\" exec '{}' \
         double::the_double_serves_when_it_is_started_as_firecracker --exact --nocapture 3>&1 1>/dev/null\n",
        std::env::current_exe().unwrap().display()
    );
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// The machine.
#[derive(Default)]
struct Machine {
    state: &'static str,
    configured: HashMap<String, Value>,
    count: u64,
    screen: Vec<u8>,
    is_asked_to_end: bool,
    log: Option<PathBuf>,
}

struct Double {
    machine: Mutex<Machine>,
    changed: Condvar,
    screen: Mutex<fs::File>,
}

#[test]
fn the_double_serves_when_it_is_started_as_firecracker() {
    let Ok(arguments) = std::env::var(ARGUMENTS) else { return };
    let words: Vec<&str> = arguments.split(' ').collect();
    let value = |name: &str| words.iter().position(|word| *word == name).map(|at| words[at + 1]);
    let screen = fs::OpenOptions::new().append(true).open("/proc/self/fd/3").unwrap();
    let machine =
        Machine { state: "Not started", log: value("--log-path").map(PathBuf::from), ..Machine::default() };
    let double = Arc::new(Double {
        machine: Mutex::new(machine),
        changed: Condvar::new(),
        screen: Mutex::new(screen),
    });
    let listener = listen_late(value("--api-sock").unwrap(), &double);
    for stream in listener.incoming() {
        let double = double.clone();
        std::thread::spawn(move || serve(&double, stream.unwrap()));
    }
}

/// As Firecracker does: its socket is there some time before it accepts.
fn listen_late(path: &str, double: &Double) -> UnixListener {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, listen, socket};
    let socket = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    let machine = double.machine.lock().unwrap();
    drop(double.changed.wait_timeout(machine, ACCEPT_DELAY).unwrap());
    listen(&socket, 16).unwrap();
    UnixListener::from(socket)
}

fn serve(double: &Arc<Double>, stream: UnixStream) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut writer = stream;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        let mut words = line.split_ascii_whitespace();
        let (method, path) = (words.next().unwrap().to_owned(), words.next().unwrap().to_owned());
        let mut length = 0;
        loop {
            let mut header = String::new();
            reader.read_line(&mut header).unwrap();
            if header.trim().is_empty() {
                break;
            }
            if let Some(value) = header.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        let (status, answer) = match answer(double, &method, &path, &body) {
            Ok(Value::Null) => (204, String::new()),
            Ok(value) => (200, value.to_string()),
            Err(fault) => (400, json!({ "fault_message": fault }).to_string()),
        };
        let head = format!("HTTP/1.1 {status} \r\nContent-Length: {}\r\n\r\n", answer.len());
        if writer.write_all((head + &answer).as_bytes()).is_err() {
            return;
        }
        if path == "/snapshot/load" && status == 400 {
            end(double, 1);
        }
    }
}

fn required(method: &str, path: &str) -> Option<Vec<&'static str>> {
    let matches = |pattern: &str| match pattern.split_once("{id}") {
        Some((prefix, _)) => path.starts_with(prefix) && path.len() > prefix.len(),
        None => pattern == path,
    };
    let lines = CONTRACT.lines().filter(|line| !line.starts_with('#'));
    let mut lines = lines.map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    lines.find(|words| words[0] == method && matches(words[1])).map(|words| words[2..].to_vec())
}

fn answer(double: &Arc<Double>, method: &str, path: &str, body: &[u8]) -> Result<Value, String> {
    let fields = required(method, path)
        .ok_or_else(|| format!("Invalid request method and/or path: {method} {path}."))?;
    let body: Value = if body.is_empty() {
        Value::Null
    } else {
        serde_json::from_slice(body).map_err(|e| e.to_string())?
    };
    if let Some(field) = fields.iter().find(|field| body[**field].is_null()) {
        return Err(format!("missing field `{field}`"));
    }
    let mut machine = double.machine.lock().unwrap();
    let is_started = machine.state != "Not started";
    let outcome = match (method, path) {
        ("GET", "/") => {
            return Ok(
                json!({ "app_name": "Firecracker", "id": "double", "state": machine.state, "vmm_version": "1.12.1" }),
            );
        }
        ("GET", "/balloon/statistics") => Err("no statistics".to_owned()),
        ("PUT", "/actions") => act(double, &mut machine, body["action_type"].as_str().unwrap_or_default()),
        ("PATCH", "/vm") if is_started => {
            machine.state = if body["state"] == "Paused" { "Paused" } else { "Running" };
            Ok(())
        }
        ("PUT", "/snapshot/create") if machine.state == "Paused" => create_snapshot(&machine, &body),
        ("PUT", "/snapshot/create") => Err("save/restore unavailable while running".to_owned()),
        ("PUT", "/snapshot/load") if !is_started => load_snapshot(double, &mut machine, &body),
        ("PUT", "/mmds") | ("PATCH", _) => Ok(()),
        _ if is_started => {
            Err("The requested operation is not supported after starting the microVM.".to_owned())
        }
        _ => {
            machine.configured.insert(path.to_owned(), body);
            Ok(())
        }
    };
    double.changed.notify_all();
    outcome.map(|()| Value::Null)
}

fn act(double: &Arc<Double>, machine: &mut Machine, action: &str) -> Result<(), String> {
    match (action, machine.state) {
        ("InstanceStart", "Not started") => {
            let source = machine.configured.get("/boot-source").ok_or("no boot source")?;
            let kernel =
                fs::read(source["kernel_image_path"].as_str().unwrap()).map_err(|e| e.to_string())?;
            let root = |drive: &Value| drive["is_root_device"] == true;
            if machine.configured.values().filter(|asked| root(asked)).count() > 1 {
                return Err("more than one root device".to_owned());
            }
            let line = source["boot_args"].as_str().unwrap_or_default().to_owned();
            machine.state = "Running";
            let is = |at: &[u8]| at == RESCUE_GREETING.as_bytes();
            let saves = kernel.windows(RESCUE_GREETING.len()).any(is);
            begin(double, line, Some(if saves { RESCUE_GREETING } else { GREETING }));
            Ok(())
        }
        ("SendCtrlAltDel", "Running") => {
            machine.is_asked_to_end = true;
            Ok(())
        }
        ("FlushMetrics", "Running" | "Paused") => {
            let path = machine.configured.get("/metrics").ok_or("no metrics")?["metrics_path"]
                .as_str()
                .unwrap()
                .to_owned();
            let mut file = fs::OpenOptions::new().append(true).open(path).unwrap();
            let line = json!({ "block": { "read_bytes": 1, "write_bytes": 2 }, "net": { "rx_bytes_count": 3, "tx_bytes_count": 4 } });
            writeln!(file, "{line}").map_err(|e| e.to_string())
        }
        _ => Err(format!("{action} is not possible while {}", machine.state)),
    }
}

fn create_snapshot(machine: &Machine, body: &Value) -> Result<(), String> {
    let line =
        machine.configured.get("/boot-source").map(|source| source["boot_args"].clone()).unwrap_or_default();
    let state = json!({ "double": true, "line": line, "count": machine.count });
    fs::write(body["snapshot_path"].as_str().unwrap(), state.to_string()).map_err(|e| e.to_string())?;
    fs::write(body["mem_file_path"].as_str().unwrap(), [7; 4096]).map_err(|e| e.to_string())
}

fn load_snapshot(double: &Arc<Double>, machine: &mut Machine, body: &Value) -> Result<(), String> {
    if Path::new("vsock.sock").exists() {
        return Err("Address already in use".to_owned());
    }
    fs::metadata(body["mem_backend"]["backend_path"].as_str().unwrap()).map_err(|e| e.to_string())?;
    let state = fs::read(body["snapshot_path"].as_str().unwrap()).map_err(|e| e.to_string())?;
    let state: Value = serde_json::from_slice(&state).map_err(|e| e.to_string())?;
    machine.count = state["count"].as_u64().unwrap();
    let line = state["line"].as_str().unwrap_or_default().to_owned();
    machine.configured.insert("/boot-source".to_owned(), json!({ "boot_args": line }));
    machine.state = if body["resume_vm"] == true { "Running" } else { "Paused" };
    begin(double, line, None);
    Ok(())
}

/// The guest, and the port on which it is typed to.
fn begin(double: &Arc<Double>, line: String, greeting: Option<&'static str>) {
    let (guest, keyboard) = (double.clone(), double.clone());
    std::thread::spawn(move || {
        if let Some(greeting) = greeting {
            print(&guest, format!("{greeting}\r\n").as_bytes());
            if line.split(' ').any(|word| word == "quit") {
                end(&guest, 0);
            }
        }
        play(&guest, &line);
    });
    std::thread::spawn(move || {
        let mut typed = std::io::stdin();
        let mut piece = [0; 256];
        while let Ok(length @ 1..) = typed.read(&mut piece) {
            keyboard.machine.lock().unwrap().screen.extend_from_slice(&piece[..length]);
            keyboard.changed.notify_all();
        }
    });
}

fn play(double: &Arc<Double>, command_line: &str) -> ! {
    let is_deaf = command_line.split(' ').any(|word| word == "deaf");
    let mut line = Vec::new();
    loop {
        let machine = double.machine.lock().unwrap();
        let (mut machine, _) = double.changed.wait_timeout(machine, COUNT_INTERVAL).unwrap();
        if machine.state != "Running" {
            continue;
        }
        machine.count += 1;
        let (typed, count) = (std::mem::take(&mut machine.screen), machine.count);
        let ends = std::mem::take(&mut machine.is_asked_to_end) && !is_deaf;
        drop(machine);
        for byte in typed {
            print(double, &[byte]);
            line.push(byte);
            if byte != b'\n' {
                continue;
            }
            match line.strip_suffix(b"\n") {
                Some(b"!quit") => end(double, 0),
                Some(b"!count") => print(double, format!("count={count}\r\n").as_bytes()),
                Some(b"!line") => print(double, format!("{command_line}\r\n").as_bytes()),
                _ => {}
            }
            line.clear();
        }
        if ends {
            end(double, 0);
        }
    }
}

fn print(double: &Double, bytes: &[u8]) {
    double.screen.lock().unwrap().write_all(bytes).unwrap();
}

/// As Firecracker ends: a last line in the log, and the status.
#[expect(
    clippy::disallowed_methods,
    reason = "the double is a process whose exit status is part of what it plays"
)]
fn end(double: &Double, code: i32) -> ! {
    // Kept, so that nothing else happens between.
    let machine = double.machine.lock().unwrap();
    if let Some(path) = &machine.log {
        let mut log = fs::OpenOptions::new().append(true).open(path).unwrap();
        writeln!(log, "double [double:main:INFO] Firecracker exiting. exit_code={code}").unwrap();
    }
    std::process::exit(code)
}

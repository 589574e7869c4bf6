//! The console on a pseudo-terminal: raw while attached, as before afterwards, on every way out.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, open};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use crate::fake::Fake;
use crate::program::against;

/// How long anything may take.
const DEADLINE: Duration = Duration::from_secs(20);

struct Session {
    child: Child,
    keyboard: File,
    /// Keeps the terminal alive after the child has gone.
    terminal: File,
    screen: Receiver<Vec<u8>>,
    seen: String,
}

impl Session {
    fn start(fake: &Fake, arguments: &[&str]) -> Self {
        let keyboard = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&keyboard).unwrap();
        unlockpt(&keyboard).unwrap();
        let name = ptsname(&keyboard, Vec::new()).unwrap();
        let terminal = File::from(open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap());
        let size = Winsize { ws_col: 90, ws_row: 30, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&terminal, size).unwrap();
        let end = || Stdio::from(terminal.try_clone().unwrap());
        let child = against(fake).args(arguments).stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();

        let keyboard = File::from(keyboard);
        let mut reader = keyboard.try_clone().unwrap();
        let (sender, screen) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count) = reader.read(&mut buffer) {
                if count == 0 || sender.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self { child, keyboard, terminal, screen, seen: String::new() }
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.terminal).unwrap().local_modes.contains(LocalModes::ICANON)
    }

    #[track_caller]
    fn expect(&mut self, text: &str) {
        let end = Instant::now() + DEADLINE;
        while !self.seen.contains(text) {
            let left = end.saturating_duration_since(Instant::now());
            match self.screen.recv_timeout(left) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(_) => panic!("{text:?} was not printed: {:?}", self.seen),
            }
        }
    }

    /// The exit code, or 128 and the signal.
    #[track_caller]
    fn ended(&mut self) -> i32 {
        let end = Instant::now() + DEADLINE;
        while Instant::now() < end {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().unwrap_or(-1);
            }
            let _ = self.screen.recv_timeout(Duration::from_millis(20));
        }
        panic!("it has not ended: {:?}", self.seen);
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // It has usually ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn keys_go_to_the_guest_and_the_detach_key_restores_the_terminal() {
    let fake = Fake::with_instances();
    let mut session = Session::start(&fake, &["vm", "console", "web"]);
    session.expect("Ctrl-] detaches");
    session.expect("booted[90x30]");
    assert!(session.is_raw());
    // Ctrl-C is the guest's.
    session.keyboard.write_all(b"abc\x03def").unwrap();
    session.expect("ABC\u{3}DEF");
    session.keyboard.write_all(b"ghi\x1d").unwrap();
    assert_eq!(session.ended(), 0);
    assert!(!session.is_raw());
}

#[test]
fn the_guest_is_told_of_a_new_size() {
    let fake = Fake::with_instances();
    let mut session = Session::start(&fake, &["vm", "console", "web"]);
    session.expect("login: ");
    let size = Winsize { ws_col: 100, ws_row: 40, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&session.terminal, size).unwrap();
    // The pseudo-terminal is nobody's controlling terminal, so the signal is sent by hand, until it is heeded: the
    // program may still be about to listen.
    let end = Instant::now() + DEADLINE;
    while !session.seen.contains("[100x40]") {
        assert!(Instant::now() < end, "{:?}", session.seen);
        session.signal(Signal::WINCH);
        if let Ok(bytes) = session.screen.recv_timeout(Duration::from_millis(100)) {
            session.seen.push_str(&String::from_utf8_lossy(&bytes));
        }
    }
    session.keyboard.write_all(b"\x1d").unwrap();
    assert_eq!(session.ended(), 0);
}

#[test]
fn a_signal_and_a_closed_console_restore_the_terminal_too() {
    let fake = Fake::with_instances();
    for signal in [Signal::TERM, Signal::HUP, Signal::INT] {
        let mut session = Session::start(&fake, &["vm", "console", "web"]);
        session.expect("login: ");
        assert!(session.is_raw());
        session.signal(signal);
        assert_eq!(session.ended(), 128 + signal.as_raw());
        assert!(!session.is_raw(), "{signal:?}");
    }
    let mut session = Session::start(&fake, &["vm", "console", "web", "--detach-key", "none"]);
    session.expect("login: ");
    session.keyboard.write_all(b"exit").unwrap();
    assert_eq!(session.ended(), 0);
    assert!(!session.is_raw());
}

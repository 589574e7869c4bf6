//! Consoles and commands without a terminal.

use std::time::{Duration, Instant};

use crate::fake::Fake;
use crate::program::{ctl, ctl_with_input};

#[test]
fn until_ends_when_the_text_was_seen_also_across_messages() {
    let fake = Fake::with_instances();
    let ran = ctl(&fake, &["vm", "console", "web", "--until", "login:"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.stdout.contains("guest login:"), "{ran:?}");
}

#[test]
fn until_gives_up_at_the_timeout_with_7() {
    let fake = Fake::with_instances();
    let began = Instant::now();
    let error = ctl(&fake, &["vm", "console", "web", "--until", "never", "--timeout", "300ms"]).failed(7);
    assert!(error.contains("has not printed \"never\" after 300ms"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(10));
}

#[test]
fn piped_input_is_sent_and_the_answer_awaited() {
    let fake = Fake::with_instances();
    let arguments = ["vm", "console", "web", "--no-raw", "--linger", "500ms"];
    let text = ctl_with_input(&fake, &arguments, "hello\n").ok();
    assert!(text.ends_with("HELLO\n"), "{text:?}");
    let arguments = ["vm", "console", "web", "--no-raw", "--until", "HELLO"];
    ctl_with_input(&fake, &arguments, "hello\n").ok();
}

#[test]
fn a_console_that_closes_is_no_success_for_until() {
    let fake = Fake::with_instances();
    let ran = ctl_with_input(&fake, &["vm", "console", "web", "--no-raw"], "exit\n");
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.stderr.contains("was closed"), "{ran:?}");
    let error =
        ctl_with_input(&fake, &["vm", "console", "web", "--no-raw", "--until", "x y"], "exit\n").failed(1);
    assert!(error.contains("was closed before"), "{error}");
}

#[test]
fn exec_passes_output_input_and_the_exit_code_through() {
    let fake = Fake::with_instances();
    let ran = ctl(&fake, &["vm", "exec", "web", "--", "echo", "-n", "a b"]);
    assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.as_str()), (0, "echo -n a b", "warning\n"));
    assert_eq!(ctl(&fake, &["vm", "exec", "web", "--", "exit", "42"]).code, 42);
    assert_eq!(ctl_with_input(&fake, &["vm", "exec", "-i", "web", "--", "cat"], "bytes").ok(), "bytes");
    let error = ctl(&fake, &["vm", "exec", "-t", "web", "--", "sh"]).failed(2);
    assert!(error.contains("terminal"), "{error}");
}

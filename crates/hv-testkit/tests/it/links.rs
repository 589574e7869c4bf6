//! The network that chaos is made in: hosts reach one another, cuts work one way, and the dead leave nothing behind.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use hv_testkit::{Cut, Host, Network};

/// Whether a datagram from one host reaches another: only then one way is enough.
fn is_heard(from: &Host, to: &Host) -> Result<bool> {
    let receive = "import socket,sys; s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.settimeout(0.5); \
                   s.bind((sys.argv[1],9)); print('bound',flush=True); s.recv(10)";
    let mut receiver = to
        .command(Path::new("python3"))
        .args(["-c", receive, to.ip()])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut bound = [0; 6];
    std::io::Read::read_exact(receiver.stdout.as_mut().expect("piped"), &mut bound)?;
    let send =
        "import socket,sys; socket.socket(socket.AF_INET,socket.SOCK_DGRAM).sendto(b'x',(sys.argv[1],9))";
    // A host that is cut off may be told so by its own kernel.
    let _ = from.command(Path::new("python3")).args(["-c", send, to.ip()]).stderr(Stdio::null()).status()?;
    Ok(receiver.wait()?.success())
}

#[test]
fn a_link_is_cut_one_way_and_mended() -> Result<()> {
    let Some(network) = Network::create("hv-testkit links")? else { return Ok(()) };
    let (a, b) = (network.add_host()?, network.add_host()?);
    ensure!(is_heard(&a, &b)? && is_heard(&b, &a)?, "hosts do not reach one another");
    a.cut(Cut::In)?;
    ensure!(is_heard(&a, &b)? && !is_heard(&b, &a)?, "a cut that is to be deaf is not just that");
    a.heal()?;
    a.cut(Cut::Out)?;
    ensure!(!is_heard(&a, &b)? && is_heard(&b, &a)?, "a cut that is to be mute is not just that");
    a.heal()?;
    a.cut_from(b.ip(), Cut::Both)?;
    ensure!(!is_heard(&a, &b)? && !is_heard(&b, &a)?, "a cut between two does not cut");
    a.heal()?;
    ensure!(is_heard(&a, &b)? && is_heard(&b, &a)?, "what was mended is still cut");
    Ok(())
}

#[test]
fn what_a_dead_run_left_behind_is_swept() -> Result<()> {
    let Some(_network) = Network::create("hv-testkit links")? else { return Ok(()) };
    let mut ended = Command::new("true").spawn()?;
    let dead = ended.id();
    ended.wait()?;
    let left = format!("hvt-{dead}-0-0");
    ensure!(Command::new("ip").args(["netns", "add", &left]).status()?.success(), "it cannot be made");
    let _network = Network::create("hv-testkit links")?;
    ensure!(!Path::new("/run/netns").join(&left).exists(), "{left} is still there");
    Ok(())
}

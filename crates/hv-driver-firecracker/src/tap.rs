//! The tap interface of an instance: the host's end of its network card.
//!
//! It is made before the instance starts, belongs to the instance's user, stays as long as the instance, and is named
//! after the user id, so that the name is short enough (15 bytes, `IFNAMSIZ`) and no two have one.

use std::path::Path;
use std::process::Stdio;

use tokio::process::Command;

use crate::problem::{Outcome, Problem};

/// Where the interfaces of an instance live and what they are connected to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'a> {
    pub(crate) netns: Option<&'a Path>,
    pub(crate) bridge: Option<&'a str>,
}

/// The tap of the instance with this user id.
pub(crate) fn name(uid: u32) -> String {
    format!("hvfc{uid}")
}

/// The card's address: locally administered, and another for each user id.
pub(crate) fn mac(uid: u32) -> String {
    let [a, b, c, d] = uid.to_be_bytes();
    format!("06:68:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

/// Makes it anew: one that an earlier start left may belong to somebody else by now.
pub(crate) async fn make(place: Place<'_>, uid: u32, owner: u32) -> Outcome<()> {
    remove(place, uid).await?;
    let (name, owner) = (name(uid), owner.to_string());
    ip(place, &["tuntap", "add", "dev", &name, "mode", "tap", "user", &owner, "group", &owner]).await?;
    if let Some(bridge) = place.bridge {
        ip(place, &["link", "set", "dev", &name, "master", bridge]).await?;
    }
    ip(place, &["link", "set", "dev", &name, "up"]).await
}

/// Removes it; one that is not there is removed already.
pub(crate) async fn remove(place: Place<'_>, uid: u32) -> Outcome<()> {
    match ip(place, &["link", "delete", "dev", &name(uid)]).await {
        Err(Problem::Tool { stderr, .. }) if stderr.contains("Cannot find device") => Ok(()),
        other => other,
    }
}

/// Whether it may be there.
pub(crate) fn may_exist(place: Place<'_>, uid: u32) -> bool {
    place.netns.is_some() || Path::new("/sys/class/net").join(name(uid)).exists()
}

async fn ip(place: Place<'_>, arguments: &[&str]) -> Outcome<()> {
    let mut command = match place.netns {
        None => Command::new("ip"),
        Some(netns) => {
            let mut inside = Command::new("nsenter");
            let mut option = std::ffi::OsString::from("--net=");
            option.push(netns);
            inside.arg(option).arg("ip");
            inside
        }
    };
    command.args(arguments).env("LC_ALL", "C").stdin(Stdio::null()).kill_on_drop(true);
    let remedy = "apt-get install iproute2";
    let spawned = command.output().await;
    let output = spawned.map_err(|source| Problem::Spawn { tool: "ip".to_owned(), remedy, source })?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Problem::Tool {
        tool: format!("ip {}", arguments.join(" ")),
        status: output.status.to_string(),
        stderr,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_addresses_fit_and_differ() {
        assert!(name(u32::MAX).len() <= 15);
        assert_eq!(mac(200_001), "06:68:00:03:0d:41");
        assert_ne!(mac(1), mac(2));
    }
}

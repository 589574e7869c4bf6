//! What this node's QEMU is and can do, found out once for each binary.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use hv_machine::kvm;
use tokio::io::AsyncWriteExt as _;
use tokio::process::{Child, Command};

use crate::argv::SANDBOX;
use crate::options::{Accel, QemuOptions};
use crate::problem::{Outcome, Problem};

/// How long QEMU may take to say its version.
const INSPECT_TIMEOUT: Duration = Duration::from_secs(20);
/// Where the emulator is found if not in `PATH`.
const ELSEWHERE: [&str; 2] = ["/usr/libexec/qemu-kvm", "/usr/bin/qemu-kvm"];

/// What runs the guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Accelerator {
    Kvm,
    Tcg,
}

/// A QEMU that works.
#[derive(Clone, Debug)]
pub(crate) struct Platform {
    pub(crate) binary: PathBuf,
    modified: Option<SystemTime>,
    pub(crate) version: String,
    pub(crate) sandbox: bool,
    pub(crate) accelerator: Accelerator,
    /// What an operator should know.
    pub(crate) message: String,
}

impl Platform {
    /// Whether the binary is still the one that was looked at.
    pub(crate) fn is_current(&self) -> bool {
        modified(&self.binary) == self.modified && self.modified.is_some()
    }

    #[cfg(test)]
    pub(crate) fn for_tests(accelerator: Accelerator) -> Self {
        let binary = PathBuf::from("qemu");
        Self {
            binary,
            modified: None,
            version: String::new(),
            sandbox: true,
            accelerator,
            message: String::new(),
        }
    }

    /// Looks at this node's QEMU. The error is for an operator.
    pub(crate) async fn inspect(options: &QemuOptions) -> Result<Self, String> {
        let binary = match &options.qemu_binary {
            Some(path) => Some(path.clone()).filter(|path| path.is_file()),
            None => find(&format!("qemu-system-{}", std::env::consts::ARCH))
                .or_else(|| ELSEWHERE.iter().map(PathBuf::from).find(|path| path.is_file())),
        };
        let binary = binary.ok_or_else(|| match &options.qemu_binary {
            Some(path) => format!(
                "there is no {}; correct drivers.qemu.binary, or apt-get install qemu-system-x86",
                path.display()
            ),
            None => "qemu is not installed; apt-get install qemu-system-x86 qemu-utils".to_owned(),
        })?;
        let (version, sandbox) = match version(&binary, true).await {
            Ok(version) => (version, true),
            Err(_) => (version(&binary, false).await.map_err(|e| describe(&binary, &e))?, false),
        };
        let (accelerator, mut message) = accelerator(options.accel, &binary).await?;
        if !sandbox {
            message.push_str("; this qemu has no seccomp sandbox");
        }
        let modified = modified(&binary);
        Ok(Self { binary, modified, version, sandbox, accelerator, message })
    }
}

fn describe(binary: &Path, problem: &Problem) -> String {
    let cause = std::error::Error::source(problem).map(|cause| format!(": {cause}")).unwrap_or_default();
    format!(
        "{} does not work: {problem}{cause}; apt-get install --reinstall qemu-system-x86",
        binary.display()
    )
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|file| file.modified()).ok()
}

/// Where a program is in `PATH`.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|path| path.is_file())
}

async fn accelerator(wanted: Accel, binary: &Path) -> Result<(Accelerator, String), String> {
    let probed = match wanted {
        Accel::Tcg => return Ok((Accelerator::Tcg, "emulating, as configured".to_owned())),
        Accel::Auto | Accel::Kvm => kvm::probe(binary).await,
    };
    match (wanted, probed) {
        (_, Ok(())) => Ok((Accelerator::Kvm, "KVM".to_owned())),
        (Accel::Kvm, Err(reason)) => {
            Err(format!("no usable KVM: {reason}; set drivers.qemu.accel to auto to emulate"))
        }
        (Accel::Auto | Accel::Tcg, Err(reason)) => {
            tracing::warn!(%reason, "no usable KVM: guests are emulated and run slowly");
            Ok((Accelerator::Tcg, format!("no usable KVM: emulating; {reason}")))
        }
    }
}

fn quiet(binary: &Path) -> Command {
    let mut command = Command::new(binary);
    command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

fn spawn(mut command: Command) -> Outcome<Child> {
    let remedy = "check that it is executable";
    command.spawn().map_err(|source| Problem::Spawn { tool: "qemu".to_owned(), remedy, source })
}

/// The version that QEMU's own greeting tells; fails if it does not start so.
async fn version(binary: &Path, sandbox: bool) -> Outcome<String> {
    let mut command = quiet(binary);
    command.args(["-machine", "none", "-qmp", "stdio"]);
    if sandbox {
        command.args(["-sandbox", SANDBOX]);
    }
    let mut child = spawn(command)?;
    let work = async {
        if let Some(mut stdin) = child.stdin.take() {
            // If it has ended already its status says so.
            let _ = stdin.write_all(b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"quit\"}\n").await;
        }
        child.wait_with_output().await
    };
    let output = tokio::time::timeout(INSPECT_TIMEOUT, work).await.map_err(|_| Problem::Timeout {
        what: "asking qemu for its version".to_owned(),
        timeout_ms: 20_000,
    })?;
    let output = output.map_err(Problem::Process)?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(Problem::Tool { tool: "qemu".to_owned(), status: output.status.to_string(), stderr });
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let greeting: serde_json::Value =
        text.lines().next().and_then(|line| serde_json::from_str(line).ok()).unwrap_or_default();
    let number = &greeting["QMP"]["version"]["qemu"];
    let part = |name: &str| number[name].as_u64().unwrap_or(0);
    Ok(format!("{}.{}.{}", part("major"), part("minor"), part("micro")))
}

//! Containers' addresses: the standard CNI plugins (bridge, host-local), called directly (CNI specification 0.4.0).
//!
//! The network namespace is the runtime's: made with the container's first process and gone with it, and with it its
//! end of the link. What remains to be given back is the address.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio::sync::OnceCell;

use crate::ContainerdOptions;
use crate::files::ADDRESSES;
use crate::problem::{Outcome, Problem};

/// How long a plugin may take.
const PLUGIN_TIMEOUT: Duration = Duration::from_secs(20);
/// Where distributions put the plugins.
const USUAL_PLACES: [&str; 4] = ["/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni", "/usr/local/lib/cni"];
/// The container's interface.
const INTERFACE: &str = "eth0";
/// The version of the plugins' protocol: what all of 0.6 to 1.x speak.
const VERSION: &str = "0.4.0";

/// The network that containers are connected to.
pub(crate) struct Network {
    plugins: Option<PathBuf>,
    config: Value,
    subnet: String,
    masquerade: bool,
    is_masqueraded: OnceCell<()>,
}

impl Network {
    pub(crate) fn new(options: &ContainerdOptions, state_dir: &Path) -> Self {
        let places = match &options.cni_bin_dir {
            Some(dir) => vec![dir.clone()],
            None => USUAL_PLACES.iter().map(PathBuf::from).collect(),
        };
        let has_all =
            |dir: &PathBuf| ["bridge", "host-local"].iter().all(|plugin| dir.join(plugin).is_file());
        let config = json!({
            "cniVersion": VERSION,
            "name": options.bridge,
            "type": "bridge",
            "bridge": options.bridge,
            "isGateway": true,
            "ipMasq": false,
            "hairpinMode": true,
            "ipam": {
                "type": "host-local",
                "ranges": [[{ "subnet": options.subnet }]],
                "routes": [{ "dst": "0.0.0.0/0" }],
                "dataDir": state_dir.join(ADDRESSES),
            },
        });
        Self {
            plugins: places.into_iter().find(has_all),
            config,
            subnet: options.subnet.clone(),
            masquerade: options.masquerade,
            is_masqueraded: OnceCell::new(),
        }
    }

    /// What an operator should know; `None` where all is well.
    pub(crate) fn remark(&self) -> Option<&'static str> {
        match self.plugins {
            Some(_) => None,
            None => Some(
                "the CNI plugins bridge and host-local were not found: containers have a loopback only; \
                 apt-get install containernetworking-plugins, or set cni_bin_dir",
            ),
        }
    }

    /// Connects the namespace of a process. `None` where there are no plugins.
    pub(crate) async fn connect(&self, id: &str, pid: i32) -> Outcome<Option<IpAddr>> {
        if self.plugins.is_none() {
            return Ok(None);
        }
        let told = self.call("ADD", id, &format!("/proc/{pid}/ns/net")).await?;
        if self.masquerade {
            self.is_masqueraded.get_or_init(|| self.start_masquerade()).await;
        }
        let address =
            told["ips"][0]["address"].as_str().and_then(|text| text.split('/').next()?.parse().ok());
        match address {
            Some(address) => Ok(Some(address)),
            None => Err(Problem::Tool {
                tool: "the bridge plugin".to_owned(),
                message: "it told no address".to_owned(),
            }),
        }
    }

    /// Gives the address back. The namespace need not be there any more.
    pub(crate) async fn disconnect(&self, id: &str) -> Outcome<()> {
        match self.plugins {
            Some(_) => self.call("DEL", id, "").await.map(drop),
            None => Ok(()),
        }
    }

    async fn call(&self, command: &'static str, id: &str, namespace: &str) -> Outcome<Value> {
        let tool = format!("the bridge plugin ({command})");
        let failed = |message: String| Problem::Tool { tool: tool.clone(), message };
        let dir = self.plugins.as_deref().unwrap_or(Path::new("/"));
        let mut plugin = Command::new(dir.join("bridge"));
        plugin.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        plugin.env("CNI_COMMAND", command).env("CNI_CONTAINERID", id).env("CNI_IFNAME", INTERFACE);
        plugin.env("CNI_NETNS", namespace).env("CNI_PATH", dir);
        plugin.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = plugin.spawn().map_err(|e| failed(e.to_string()))?;
        let mut stdin = child.stdin.take();
        let config = self.config.to_string();
        let work = async {
            if let Some(stdin) = &mut stdin {
                stdin.write_all(config.as_bytes()).await?;
            }
            drop(stdin);
            child.wait_with_output().await
        };
        let output = tokio::time::timeout(PLUGIN_TIMEOUT, work).await;
        let output =
            output.map_err(|_| failed(format!("it did not end within {} s", PLUGIN_TIMEOUT.as_secs())))?;
        let output = output.map_err(|e| failed(e.to_string()))?;
        let told: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        if output.status.success() {
            return Ok(told);
        }
        let words = [&told["msg"], &told["details"]].map(|word| word.as_str().unwrap_or_default());
        let stderr = String::from_utf8_lossy(&output.stderr);
        Err(failed(format!("{}: {} {}", words.join(" "), stderr.trim(), output.status)))
    }

    /// One rule for the whole network. Where it cannot be made containers reach each other and the node.
    async fn start_masquerade(&self) {
        let rule = |action: &'static str| {
            let words =
                ["-w", "5", "-t", "nat", action, "POSTROUTING", "-s", &self.subnet, "!", "-d", &self.subnet];
            let mut command = Command::new("iptables");
            command.args(words).args(["-j", "MASQUERADE"]).stdin(Stdio::null()).stdout(Stdio::null());
            command.stderr(Stdio::null()).kill_on_drop(true);
            async move { tokio::time::timeout(PLUGIN_TIMEOUT, command.status()).await }
        };
        let is_done = |status: &Result<std::io::Result<std::process::ExitStatus>, _>| matches!(status, Ok(Ok(status)) if status.success());
        if !is_done(&rule("-C").await) && !is_done(&rule("-A").await) {
            tracing::warn!(subnet = %self.subnet, "no iptables rule could be made: containers do not reach other networks");
        }
    }
}

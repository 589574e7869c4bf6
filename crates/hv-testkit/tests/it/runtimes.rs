//! A node that runs every type of instance that this machine can: what the tests of all of them begin with.

use std::path::PathBuf;

use anyhow::Result;
use hv_testkit::{AgentOptions, Cluster, ClusterOptions, Containerd, firecracker};
use tempfile::TempDir;

/// A cluster with one node, and a user's home directory with the images that the set-up builds.
pub(crate) struct Runtimes {
    pub(crate) cluster: Cluster,
    pub(crate) home: TempDir,
    no_containers: Option<String>,
    no_microvms: Option<String>,
    /// Ends after the agent.
    pub(crate) containerd: Option<Containerd>,
}

impl Runtimes {
    /// A node that claims to have so many cores and bytes of memory; `None`: what the machine has.
    pub(crate) async fn start(images: PathBuf, capacity: Option<(u32, u64)>) -> Result<Self> {
        let home = tempfile::tempdir()?;
        let fetched = home.path().join(".cache/hypervisor/images");
        std::fs::create_dir_all(&fetched)?;
        let bring = |name: &str| {
            let copied = std::fs::copy(images.join(name), fetched.join(name));
            copied.err().map(|_| format!("there is no {name}: run hack/setup.sh images"))
        };
        let mut drivers = vec!["qemu"];
        let mut env = vec![("HYPERVISOR_IMAGES_FILE_DIRS", format!("[{}]", fetched.display()))];
        let no_containers = Containerd::missing().map(str::to_owned).or_else(|| bring("hello-container.tar"));
        let containerd = match no_containers {
            None => Some(Containerd::start().await?),
            Some(_) => None,
        };
        if let Some(containerd) = &containerd {
            drivers.push("containerd");
            env.extend(containerd.env());
        }
        let no_microvms = match firecracker() {
            Err(why) => Some(why.to_owned()),
            Ok(program) => {
                drivers.push("firecracker");
                env.push(("HYPERVISOR_FIRECRACKER_BINARY_PATH", program.display().to_string()));
                bring("hello-microvm.elf")
            }
        };
        let mut cluster = Cluster::start(ClusterOptions::default()).await?;
        let options =
            AgentOptions { drivers, image_dir: Some(images), env, capacity, ..AgentOptions::default() };
        cluster.add_agent(options).await?;
        cluster.until_ready(1).await?;
        Ok(Self { cluster, home, no_containers, no_microvms, containerd })
    }

    /// What keeps it from running a type.
    pub(crate) fn lacks(&self, needs: &str) -> Option<String> {
        match needs {
            "container" => self.no_containers.clone(),
            "microvm" => self.no_microvms.clone(),
            _ => None,
        }
    }

    /// Makes the node fetch the image of a type under the name `hello-TYPE`.
    pub(crate) async fn pull(&self, kind: &str) -> Result<()> {
        let ending = if kind == "container" { "tar" } else { "elf" };
        let file = self.home.path().join(format!(".cache/hypervisor/images/hello-{kind}.{ending}"));
        let (name, reference) = (format!("hello-{kind}"), format!("file://{}", file.display()));
        self.cluster.ctl(&["image", "pull", "--type", kind, "--name", &name, &reference]).await?;
        Ok(())
    }
}

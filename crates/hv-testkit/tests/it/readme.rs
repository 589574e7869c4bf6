//! The commands of the README, run as a reader would type them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use hv_testkit::{AgentOptions, Cluster, ClusterOptions, Containerd, Program, firecracker, image_dir, skip};
use tempfile::TempDir;

/// Marks the blocks whose commands are run in order against a cluster that runs. What follows on the line is the type of
/// instance that the node must run for it.
const TOUR: &str = "```sh tour";

#[tokio::test(flavor = "multi_thread")]
async fn every_command_of_the_tour_works() -> Result<()> {
    take_tour("README.md").await
}

#[tokio::test(flavor = "multi_thread")]
async fn every_command_of_the_chinese_tour_works() -> Result<()> {
    take_tour("README.zh-CN.md").await
}

/// A block of the tour.
struct Block<'a> {
    /// The type of instance that it needs; empty: a virtual machine.
    needs: &'a str,
    commands: Vec<&'a str>,
}

async fn take_tour(file: &str) -> Result<()> {
    let Some(images) = image_dir() else {
        skip("hv-testkit readme", "there is no guest image: run hack/setup.sh images");
        return Ok(());
    };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(file);
    let text = std::fs::read_to_string(&path).with_context(|| format!("{file} cannot be read"))?;
    let blocks = blocks(&text);
    let count: usize = blocks.iter().map(|block| block.commands.len()).sum();
    ensure!(count >= 20, "{file} has only {count} commands in its tour");
    for needs in ["container", "microvm"] {
        ensure!(blocks.iter().any(|block| block.needs == needs), "{file} has no {needs} in its tour");
    }

    let node = Node::start(images).await?;
    for block in blocks {
        if let Some(why) = node.lacks(block.needs) {
            skip(&format!("hv-testkit readme, {}", block.needs), &why);
            continue;
        }
        for command in block.commands {
            run(&node, command).await.map_err(|error| error.context(node.cluster.logs()))?;
        }
    }
    Ok(())
}

fn blocks(text: &str) -> Vec<Block<'_>> {
    let parts = text.split(TOUR).skip(1).filter_map(|rest| rest.split("```").next());
    let blocks = parts.filter_map(|part| part.split_once('\n'));
    blocks
        .map(|(needs, lines)| Block {
            needs: needs.trim(),
            commands: lines.lines().map(str::trim).filter(|line| !line.is_empty()).collect(),
        })
        .collect()
}

/// A cluster with one node that runs all that this machine can, and a reader's home directory.
struct Node {
    cluster: Cluster,
    no_containers: Option<String>,
    no_microvms: Option<String>,
    home: TempDir,
    // Ends after the agent.
    _containerd: Option<Containerd>,
}

impl Node {
    async fn start(images: PathBuf) -> Result<Self> {
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
        let options = AgentOptions { drivers, image_dir: Some(images), env, ..AgentOptions::default() };
        cluster.add_agent(options).await?;
        cluster.until_ready(1).await?;
        Ok(Self { cluster, no_containers, no_microvms, home, _containerd: containerd })
    }

    /// What keeps it from running a type.
    fn lacks(&self, needs: &str) -> Option<String> {
        match needs {
            "container" => self.no_containers.clone(),
            "microvm" => self.no_microvms.clone(),
            _ => None,
        }
    }
}

/// Runs one command by a shell, with the programs in its path and the server in its environment.
async fn run(node: &Node, command: &str) -> Result<()> {
    let programs = Program::Ctl.path()?.parent().context("a program without a directory")?.to_path_buf();
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap_or_default());
    let mut shell = tokio::process::Command::new("sh");
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("HYPERVISOR_"))
    {
        shell.env_remove(name);
    }
    let shell =
        shell.arg("-ec").arg(command).env("PATH", path).env("HYPERVISOR_CTL_SERVER", node.cluster.grpc_address()?).env("HOME", node.home.path());
    let output = shell.stdin(std::process::Stdio::null()).kill_on_drop(true).output().await?;
    let shown =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).join("");
    ensure!(output.status.success(), "`{command}` ended with {}: {shown}", output.status);
    Ok(())
}

//! The commands of the README, run as a reader would type them.

use anyhow::{Context, Result, ensure};
use hv_testkit::{AgentOptions, Cluster, ClusterOptions, Program, image_dir, skip};

/// Marks the blocks whose commands are run in order against a cluster that runs.
const TOUR: &str = "```sh tour";

#[tokio::test(flavor = "multi_thread")]
async fn every_command_of_the_tour_works() -> Result<()> {
    take_tour("README.md").await
}

#[tokio::test(flavor = "multi_thread")]
async fn every_command_of_the_chinese_tour_works() -> Result<()> {
    take_tour("README.zh-CN.md").await
}

async fn take_tour(file: &str) -> Result<()> {
    let Some(images) = image_dir() else {
        skip("hv-testkit readme", "there is no guest image: run hack/setup.sh images");
        return Ok(());
    };
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(file);
    let text = std::fs::read_to_string(&path).with_context(|| format!("{file} cannot be read"))?;
    let commands = commands(&text);
    ensure!(commands.len() >= 10, "{file} has only {} commands in its tour", commands.len());

    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let options = AgentOptions { drivers: vec!["qemu"], image_dir: Some(images), ..AgentOptions::default() };
    cluster.add_agent(options).await?;
    cluster.until_ready(1).await?;
    for command in commands {
        run(&cluster, command).await.map_err(|error| error.context(cluster.logs()))?;
    }
    Ok(())
}

fn commands(text: &str) -> Vec<&str> {
    let blocks = text.split(TOUR).skip(1).filter_map(|rest| rest.split("```").next());
    blocks
        .flat_map(str::lines)
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .collect()
}

/// Runs one command by a shell, with the programs in its path and the server in its environment.
async fn run(cluster: &Cluster, command: &str) -> Result<()> {
    let programs = Program::Ctl.path()?.parent().context("a program without a directory")?.to_path_buf();
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap_or_default());
    let mut shell = tokio::process::Command::new("sh");
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("HYPERVISOR_"))
    {
        shell.env_remove(name);
    }
    let shell =
        shell.arg("-ec").arg(command).env("PATH", path).env("HYPERVISOR_CTL_SERVER", cluster.grpc_address()?);
    let output = shell.stdin(std::process::Stdio::null()).kill_on_drop(true).output().await?;
    let shown =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).join("");
    ensure!(output.status.success(), "`{command}` ended with {}: {shown}", output.status);
    Ok(())
}

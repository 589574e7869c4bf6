//! The commands of the README, run as a reader would type them.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use hv_testkit::{Program, image_dir, skip};

use crate::runtimes::Runtimes;

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

    let node = Runtimes::start(images, None).await?;
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

/// Runs one command by a shell, with the programs in its path and the server in its environment.
async fn run(node: &Runtimes, command: &str) -> Result<()> {
    let programs = Program::Ctl.path()?.parent().context("a program without a directory")?.to_path_buf();
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap_or_default());
    let mut shell = tokio::process::Command::new("sh");
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("HYPERVISOR_"))
    {
        shell.env_remove(name);
    }
    let shell = shell
        .arg("-ec")
        .arg(command)
        .env("PATH", path)
        .env("HYPERVISOR_CTL_SERVER", node.cluster.grpc_address()?)
        .env("HOME", node.home.path());
    let output = shell.stdin(std::process::Stdio::null()).kill_on_drop(true).output().await?;
    let shown =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).join("");
    ensure!(output.status.success(), "`{command}` ended with {}: {shown}", output.status);
    Ok(())
}

//! Moves of real virtual machines between two agents, while their guests count, dirty memory and write to their disks.
//! `MOVE_RUNS` asks for more moves with faults than the few that are made always.

mod consoles;
mod faults;
mod guest;
mod moving;

use anyhow::{Context as _, Result, ensure};
use hv_testkit::until;

use moving::{Disks, Moving, Options, SOURCE, TARGET, number, text};

const SUITE: &str = "hv-testkit moves";

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_moves_with_copied_disks_and_counts_on() -> Result<()> {
    there_and_back(Disks::Copied).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_moves_with_shared_disks_and_counts_on() -> Result<()> {
    there_and_back(Disks::Shared).await
}

async fn there_and_back(disks: Disks) -> Result<()> {
    let Some(moving) = Moving::start(SUITE, Options::new(disks)).await? else { return Ok(()) };
    let steps = async {
        moves(&moving, SOURCE, TARGET).await?;
        moves(&moving, TARGET, SOURCE).await?;
        // What it wrote before its last move is on the disk that it has now.
        moving.cluster.ctl(&["instance", "restart", "web", "--force"]).await?;
        let told = moving.counts_on(10).await?;
        ensure!(told.restarts == 1, "it was started anew from its disk: {told:?}");
        moving.cluster.ctl(&["instance", "delete", "web"]).await?;
        nothing_left(&moving, SOURCE).await?;
        nothing_left(&moving, TARGET).await?;
        anyhow::Ok(())
    };
    steps.await.with_context(|| moving.cluster.logs())
}

async fn nothing_left(moving: &Moving, agent: usize) -> Result<()> {
    until(&format!("agent {agent} to have nothing of it"), async || {
        let left = moving.left_at(agent)?;
        ensure!(left.is_empty(), "left: {left:?}");
        Ok(Some(()))
    })
    .await
}

/// One move, as a user asks for it and sees it.
async fn moves(moving: &Moving, from: usize, to: usize) -> Result<()> {
    let before = moving.get().await?;
    let out = moving.migrate(&[]).await?;
    ensure!(out.contains("moved to node") && out.contains(" ms"), "it says where to, and how long: {out}");
    eprintln!("{}", out.trim());
    let after = moving.get().await?;
    ensure!(text(&after, "nodeId") == format!("node-{to}"), "its record names the other node: {after}");
    ensure!(text(&after, "state") == "INSTANCE_STATE_RUNNING", "it runs: {after}");
    ensure!(number(&after, "epoch") == number(&before, "epoch") + 1, "its epoch has grown by one: {after}");
    let told = moving.counts_on(20).await?;
    ensure!(told.restarts == 0, "it was not started anew: {told:?}");
    moving.answers().await?;
    ensure!(moving.processes(to)?.len() == 1, "one process runs at its new node");
    nothing_left(moving, from).await?;
    let used = async |node: usize| -> Result<u64> {
        let node = moving.cluster.ctl(&["node", "get", &format!("node-{node}"), "-o", "json"]).await?;
        let node: serde_json::Value = serde_json::from_str(&node)?;
        Ok(number(&node["allocated"], "cpuCores"))
    };
    ensure!((used(from).await?, used(to).await?) == (0, 1), "it takes room at its new node alone");
    let operation = moving.last_operation().await?;
    ensure!(text(&operation, "state") == "OPERATION_STATE_SUCCEEDED", "{operation}");
    Ok(())
}

/// A node that does not have the image fetches it first, and it is the very image that the instance was made from.
#[tokio::test(flavor = "multi_thread")]
async fn a_machine_of_a_fetched_image_moves_to_a_node_that_does_not_have_it() -> Result<()> {
    let options = Options { fetched: true, ..Options::new(Disks::Copied) };
    let Some(moving) = Moving::start(SUITE, options).await? else { return Ok(()) };
    let steps = async {
        let file = moving.image_file();
        let image = std::fs::read(&file)?;
        std::fs::write(&file, vec![7; image.len()])?;
        let refused = moving.migrate(&[]).await;
        ensure!(
            refused.as_ref().is_err_and(|e| format!("{e:#}").contains("sha256:")),
            "the image has changed: {refused:?}"
        );
        std::fs::write(&file, image)?;
        moves(&moving, SOURCE, TARGET).await?;
        let users = moving.cluster.agent_dir(TARGET).join("image-store/users");
        let held = std::fs::read_dir(&users)?.filter_map(|entry| Some(entry.ok()?.file_name()));
        let is_held = held.into_iter().any(|name| name.to_string_lossy().contains(&moving.id));
        ensure!(is_held, "its new node does not keep its image for it");
        moving.cluster.ctl(&["instance", "restart", "web", "--force"]).await?;
        ensure!(moving.counts_on(10).await?.restarts == 1, "it starts at its new node");
        anyhow::Ok(())
    };
    steps.await.with_context(|| moving.cluster.logs())
}

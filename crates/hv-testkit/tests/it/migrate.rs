//! Moves between two agents while their instances run: real programs, the fake driver, and its ledgers.

use anyhow::{Context as _, Result, ensure};
use hv_driver_fake::{LedgerEvent, read_ledger};
use hv_proto::v1;
use hv_testkit::{AgentOptions, Cluster, ClusterOptions, create_request, until};
use serde_json::Value;

/// Two agents, and a cluster of which the first runs `web`, scripted so.
async fn pair(script: &[(&str, &str)]) -> Result<Cluster> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    for _ in 0..2 {
        let options =
            AgentOptions { drivers: vec!["fake"], capacity: Some((8, 8 << 30)), ..AgentOptions::default() };
        cluster.add_agent(options).await?;
    }
    cluster.until_ready(2).await?;
    let annotations =
        script.iter().map(|(key, value)| (format!("fake.hypervisor/{key}"), (*value).to_owned()));
    let metadata = v1::Metadata { annotations: annotations.collect(), ..v1::Metadata::default() };
    let request = v1::CreateInstanceRequest { metadata: Some(metadata), ..create_request("web") };
    cluster.clients()?.compute().create_instance(request).await?;
    until("the instance to run", async || {
        let web = get(&cluster).await?;
        Ok((web["state"] == "INSTANCE_STATE_RUNNING").then_some(()))
    })
    .await?;
    Ok(cluster)
}

async fn get(cluster: &Cluster) -> Result<Value> {
    Ok(serde_json::from_str(&cluster.ctl(&["instance", "get", "web", "-o", "json"]).await?)?)
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_default()
}

/// That at no moment two copies ran, by what both drivers wrote down; how many run at the end.
fn running(cluster: &Cluster) -> Result<usize> {
    let mut events = Vec::new();
    for agent in 0..cluster.agents() {
        let ledger = read_ledger(&cluster.agent_dir(agent).join("fake"))?;
        events.extend(ledger.into_iter().map(|entry| (entry.at_us, agent, entry.what)));
    }
    events.sort_by_key(|(at, _, what)| (*at, *what == LedgerEvent::Started));
    let mut runs = 0_usize;
    for (_, agent, what) in &events {
        match what {
            LedgerEvent::Started => runs += 1,
            LedgerEvent::Ended => runs = runs.saturating_sub(1),
            LedgerEvent::Created | LedgerEvent::Deleted => {}
        }
        ensure!(runs <= 1, "two copies run, the second on agent {agent}: {events:?}");
    }
    Ok(runs)
}

async fn moves(cluster: &Cluster) -> Result<()> {
    let before = get(cluster).await?;
    let out = cluster.ctl(&["instance", "migrate", "web"]).await?;
    ensure!(out.contains("moved to node"), "ctl says what was done: {out}");
    let after = get(cluster).await?;
    ensure!(text(&after, "nodeId") != text(&before, "nodeId"), "it is on the other node: {after}");
    ensure!(text(&after, "state") == "INSTANCE_STATE_RUNNING", "it runs: {after}");
    ensure!(text(&after, "migrationTarget").is_empty(), "it is not moving any more: {after}");
    ensure!(running(cluster)? == 1, "one copy runs");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_moves_there_and_back_and_runs_once() -> Result<()> {
    let cluster = pair(&[]).await?;
    let steps = async {
        for _ in 0..4 {
            moves(&cluster).await?;
        }
        cluster.ctl(&["instance", "delete", "web"]).await?;
        ensure!(running(&cluster)? == 0, "nothing runs");
        anyhow::Ok(())
    };
    steps.await.with_context(|| cluster.logs())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_that_breaks_down_leaves_it_where_it_was() -> Result<()> {
    let cluster = pair(&[("migration-breaks", "1")]).await?;
    let steps = async {
        let before = get(&cluster).await?;
        let refused = cluster.ctl(&["instance", "migrate", "web"]).await;
        ensure!(refused.is_err(), "it failed: {refused:?}");
        let after = get(&cluster).await?;
        ensure!(text(&after, "nodeId") == text(&before, "nodeId"), "it stayed: {after}");
        ensure!(text(&after, "state") == "INSTANCE_STATE_RUNNING", "it runs: {after}");
        ensure!(running(&cluster)? == 1, "one copy runs");
        moves(&cluster).await
    };
    steps.await.with_context(|| cluster.logs())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_that_hangs_is_cancelled_and_it_runs_on() -> Result<()> {
    let cluster = pair(&[("migration-hangs", "1")]).await?;
    let steps = async {
        let begun = cluster.ctl(&["instance", "migrate", "web", "--no-wait", "-o", "json"]).await?;
        let begun: Value = serde_json::from_str(&begun)?;
        let id = text(&begun, "id").to_owned();
        until("the transfer", async || {
            let operation = cluster.ctl(&["operation", "get", &id, "-o", "json"]).await?;
            let operation: Value = serde_json::from_str(&operation)?;
            Ok((text(&operation, "phase") == "transferring").then_some(()))
        })
        .await?;
        let refused = cluster.ctl(&["instance", "stop", "web"]).await;
        ensure!(refused.is_err_and(|e| e.to_string().contains("being moved")), "a stop is refused meanwhile");
        cluster.ctl(&["operation", "cancel", &id]).await?;
        // It has ended as cancelled, and ctl says so.
        ensure!(cluster.ctl(&["operation", "watch", &id]).await.is_err(), "it was cancelled");
        ensure!(text(&get(&cluster).await?, "state") == "INSTANCE_STATE_RUNNING", "it runs on");
        ensure!(running(&cluster)? == 1, "one copy runs");
        moves(&cluster).await
    };
    steps.await.with_context(|| cluster.logs())
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_and_the_server_may_be_killed_in_the_middle_of_a_transfer() -> Result<()> {
    for victim in ["source", "target", "server"] {
        let mut cluster = pair(&[("delay-migrate", "3s")]).await?;
        let before = text(&get(&cluster).await?, "nodeId").to_owned();
        let begun = cluster.ctl(&["instance", "migrate", "web", "--no-wait", "-o", "json"]).await?;
        let id = text(&serde_json::from_str::<Value>(&begun)?, "id").to_owned();
        until("the transfer", async || {
            let operation = cluster.ctl(&["operation", "get", &id, "-o", "json"]).await?;
            let operation: Value = serde_json::from_str(&operation)?;
            Ok((text(&operation, "phase") == "transferring").then_some(()))
        })
        .await?;
        let mut source = 0;
        for agent in 0..2 {
            let ledger = read_ledger(&cluster.agent_dir(agent).join("fake"))?;
            if ledger.iter().any(|entry| entry.what == LedgerEvent::Started) {
                source = agent;
            }
        }
        match victim {
            "source" => cluster.agent(source).context("it runs")?.kill()?,
            "target" => cluster.agent(1 - source).context("it runs")?.kill()?,
            _ => cluster.server().context("it runs")?.kill()?,
        }
        cluster.revive().await?;
        let outcome = cluster.ctl(&["operation", "watch", &id]).await;
        let after = get(&cluster).await?;
        let moved = text(&after, "nodeId") != before;
        ensure!(moved == outcome.is_ok(), "{victim}: the outcome is the truth: {outcome:?} {after}");
        until("it to run", async || {
            let web = get(&cluster).await?;
            Ok((text(&web, "state") == "INSTANCE_STATE_RUNNING").then_some(()))
        })
        .await?;
        ensure!(running(&cluster).with_context(|| cluster.logs())? == 1, "{victim}: one copy runs");
    }
    Ok(())
}

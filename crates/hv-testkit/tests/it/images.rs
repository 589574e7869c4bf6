//! Images: fetched by nodes, kept while they are used, removed when they are not.

use anyhow::{Context, Result, ensure};
use futures::StreamExt as _;
use hv_client::ComputeClient;
use hv_proto::v1;
use hv_testkit::{AgentOptions, Ask, Cluster, ClusterOptions, create_request, until};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::Code;

const VM: i32 = v1::InstanceType::Vm as i32;

/// A cluster of two nodes that may fetch files of a directory, and such a file, as a reference.
async fn cluster() -> Result<(Cluster, tempfile::TempDir, String)> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, vec![7; 3 << 20])?;
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    for _ in 0..2 {
        let env = vec![("HYPERVISOR_IMAGES_FILE_DIRS", format!("[{}]", dir.path().display()))];
        // More room than the instances of a test take from it.
        let capacity = Some((64, 1 << 40));
        let options = AgentOptions { drivers: vec!["fake"], env, capacity, ..AgentOptions::default() };
        cluster.add_agent(options).await?;
    }
    cluster.until_ready(2).await?;
    Ok((cluster, dir, format!("file://{}", path.display())))
}

fn create(name: &str, image: &str) -> v1::CreateInstanceRequest {
    let mut request = create_request(name);
    if let Some(spec) = &mut request.spec {
        spec.image = image.into();
    }
    request
}

async fn until_state(client: &ComputeClient, id: &str, state: v1::InstanceState) -> Result<v1::Instance> {
    let request = v1::GetInstanceRequest { instance_id: id.into() };
    until(&format!("{id} to be {}", state.as_str_name()), async || {
        let instance = client.clone().get_instance(request.clone()).await?.into_inner();
        Ok((instance.state() == state).then_some(instance))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_was_fetched_under_a_name_can_be_used_at_once() -> Result<()> {
    let (cluster, _dir, image) = cluster().await?;
    let client = cluster.clients()?.compute();
    let work = async {
        let request = v1::PullImageRequest {
            image_ref: image.clone(),
            r#type: VM,
            name: "mine".into(),
            ..v1::PullImageRequest::default()
        };
        let steps: Vec<_> = client.clone().pull_image(request).await?.into_inner().collect().await;
        let last = steps.into_iter().last().context("the stream was empty")??;
        ensure!(last.completed, "{last:?}");
        let id = client.clone().create_instance(create("a", "mine")).await?.into_inner().id;
        until_state(&client, &id, v1::InstanceState::Running).await?;
        Ok(())
    };
    let outcome: Result<()> = work.await;
    outcome.map_err(|error| error.context(cluster.logs()))
}

async fn until_gone(client: &ComputeClient, id: &str) -> Result<()> {
    until(&format!("{id} to be gone"), async || {
        let request = v1::GetInstanceRequest { instance_id: id.into() };
        let answer = client.clone().get_instance(request).await;
        Ok(answer.is_err_and(|status| status.code() == Code::NotFound).then_some(()))
    })
    .await
}

async fn pulled(client: &ComputeClient, image: &str, node: Option<&str>) -> Result<v1::PullImageProgress> {
    let request = v1::PullImageRequest {
        image_ref: image.into(),
        r#type: VM,
        node_ids: node.into_iter().map(str::to_owned).collect(),
        ..v1::PullImageRequest::default()
    };
    let steps: Vec<_> = client.clone().pull_image(request).await?.into_inner().collect().await;
    steps.into_iter().last().context("the stream was empty")?.map_err(Into::into)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_fetched_for_an_instance_and_stays_while_it_is_used() -> Result<()> {
    let (cluster, _dir, image) = cluster().await?;
    let client = cluster.clients()?.compute();
    let work = async {
        let id = client.clone().create_instance(create("a", &image)).await?.into_inner().id;
        let instance = until_state(&client, &id, v1::InstanceState::Running).await?;

        let request = v1::DeleteImageRequest {
            name: image.clone(),
            node_ids: vec![instance.node_id.clone()],
            ..v1::DeleteImageRequest::default()
        };
        let refused = client.clone().delete_image(request.clone()).await?.into_inner();
        let why = refused.failed.get(&instance.node_id).context("it was removed under its instance")?;
        ensure!(why.contains("in use"), "why: {why}");

        Ask::Delete.send(&client, &id, "delete").await?;
        until_gone(&client, &id).await?;
        let removed = client.clone().delete_image(request).await?.into_inner();
        ensure!(removed.node_ids == [instance.node_id], "{removed:?}");
        Ok(())
    };
    let outcome: Result<()> = work.await;
    outcome.map_err(|error| error.context(cluster.logs()))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_pulled_to_nodes_and_preferred_where_it_is() -> Result<()> {
    let (cluster, _dir, image) = cluster().await?;
    let client = cluster.clients()?.compute();
    let work = async {
        let nodes = cluster.clients()?.cluster().list_nodes(v1::ListNodesRequest::default()).await?;
        let node = nodes.into_inner().nodes.first().context("no nodes")?.id.clone();
        let last = pulled(&client, &image, Some(&node)).await?;
        ensure!(last.completed, "{last:?}");
        until("the image to be listed", async || {
            let request = v1::GetImageRequest { name: image.clone() };
            let found = client.clone().get_image(request).await;
            Ok(found.is_ok_and(|found| found.into_inner().node_ids == [node.clone()]).then_some(()))
        })
        .await?;
        for index in 0..4 {
            let request = create(&format!("b{index}"), &image);
            let id = client.clone().create_instance(request).await?.into_inner().id;
            let instance = until_state(&client, &id, v1::InstanceState::Running).await?;
            ensure!(instance.node_id == node, "{} is on {}", instance.name, instance.node_id);
        }
        let all = pulled(&client, &image, None).await?;
        ensure!(all.completed && all.total == 2, "{all:?}");
        let request = v1::GetOperationRequest { operation_id: all.operation_id };
        let operation = cluster.clients()?.operations().get_operation(request).await?.into_inner();
        let results = operation.parameters.iter().filter(|(name, _)| name.starts_with("node."));
        ensure!(operation.kind == "pull-image" && operation.state() == v1::OperationState::Succeeded);
        ensure!(results.filter(|(_, result)| *result == "done").count() == 2, "{operation:?}");
        Ok(())
    };
    let outcome: Result<()> = work.await;
    outcome.map_err(|error| error.context(cluster.logs()))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_cannot_be_had_fails_its_instance_with_the_reason() -> Result<()> {
    let (cluster, dir, _) = cluster().await?;
    let client = cluster.clients()?.compute();
    let work = async {
        let absent = format!("file://{}/absent.raw", dir.path().display());
        for (name, image, expected) in [
            ("absent", absent.as_str(), "absent.raw"),
            ("forbidden", "file:///etc/passwd", "not allowed"),
            ("garbage", "ftp://host/disk.raw", "no image reference"),
        ] {
            let id = client.clone().create_instance(create(name, image)).await?.into_inner().id;
            let failed = until_state(&client, &id, v1::InstanceState::Failed).await?;
            ensure!(failed.state_reason.contains(expected), "{name}: {}", failed.state_reason);
            let last = pulled(&client, image, None).await?;
            ensure!(!last.completed && last.error.contains(expected), "{name}: {last:?}");
            Ask::Delete.send(&client, &id, &format!("delete-{name}")).await?;
            until_gone(&client, &id).await?;
        }
        Ok(())
    };
    let outcome: Result<()> = work.await;
    outcome.map_err(|error| error.context(cluster.logs()))
}

/// A web server that sends the first half of an image, and the rest once it may; its address and its digest.
async fn slow_source(may_end: tokio::sync::watch::Receiver<bool>) -> Result<(String, String)> {
    const HALF: usize = 1 << 20;
    let content = vec![7; 2 * HALF];
    let digest = Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?.to_string();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let (mut may_end, content) = (may_end.clone(), content.clone());
            tokio::spawn(async move {
                let mut head = [0; 4096];
                let _request = stream.read(&mut head).await?;
                let answer =
                    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", 2 * HALF);
                stream.write_all(answer.as_bytes()).await?;
                stream.write_all(&content[..HALF]).await?;
                // The sender outlives the test's cluster.
                let _ = may_end.wait_for(|may_end| *may_end).await;
                stream.write_all(&content[HALF..]).await
            });
        }
    });
    Ok((address, format!("sha256:{digest}")))
}

/// Follows a pull until `enough`; the last message.
async fn followed(
    cluster: &Cluster,
    request: &v1::PullImageRequest,
    enough: impl Fn(&v1::PullImageProgress) -> bool,
) -> Result<v1::PullImageProgress> {
    until("the pull to come so far", async || {
        let Ok(steps) = cluster.clients()?.compute().pull_image(request.clone()).await else {
            return Ok(None);
        };
        let mut steps = steps.into_inner();
        while let Ok(Some(step)) = steps.message().await {
            if enough(&step) {
                return Ok(Some(step));
            }
        }
        Ok(None)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_survives_its_server_and_says_which_node_failed_and_why() -> Result<()> {
    let (open, may_end) = tokio::sync::watch::channel(false);
    let (source, digest) = slow_source(may_end).await?;
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    for allowed in [format!("[{source}]"), "[]".to_owned()] {
        let env = vec![("HYPERVISOR_IMAGES_ALLOWED_PLAIN_HTTP", allowed)];
        cluster.add_agent(AgentOptions { drivers: vec!["fake"], env, ..AgentOptions::default() }).await?;
    }
    cluster.until_ready(2).await?;
    let request = v1::PullImageRequest {
        image_ref: format!("http://{source}/disk.raw"),
        r#type: VM,
        name: "slow".into(),
        digest,
        request_key: "pull".into(),
        ..v1::PullImageRequest::default()
    };
    let outcome = lose_the_server(&mut cluster, &request, &open).await;
    outcome.map_err(|error| error.context(cluster.logs()))
}

async fn lose_the_server(
    cluster: &mut Cluster,
    request: &v1::PullImageRequest,
    may_end: &tokio::sync::watch::Sender<bool>,
) -> Result<()> {
    let under_way = followed(cluster, request, |step| step.current > 0).await?;
    let failed = followed(cluster, request, |step| step.status == "failed").await?;
    ensure!(failed.error.contains("not allowed") && !failed.node_name.is_empty(), "{failed:?}");
    if let Some(server) = cluster.server() {
        server.kill()?;
    }
    cluster.revive().await?;
    may_end.send_replace(true);
    let last = followed(cluster, request, |step| step.node_id.is_empty()).await?;
    ensure!(last.operation_id == under_way.operation_id, "another operation was begun: {last:?}");
    let says_who = last.error.contains(&failed.node_name) && last.error.contains("not allowed");
    ensure!(!last.completed && says_who && last.current == 1 && last.total == 2, "{last:?}");
    let shown = cluster.ctl(&["operation", "get", &last.operation_id, "-o", "json"]).await?;
    let done = format!("\"node.{}\": \"done\"", under_way.node_id);
    ensure!(shown.contains(&done), "{shown}");
    Ok(())
}

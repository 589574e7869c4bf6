//! `ComputeService`: instances.

use std::sync::Arc;

use hv_cluster::Cluster;
use hv_cluster::cache::{Batch, Candidate, Delta, State};
use hv_cluster::instances::{Filter, Seen};
use hv_cluster::page::Page;
use hv_proto::v1::compute_service_server::ComputeService;
use hv_proto::{convert, v1};
use hv_types::instance::{Request as Wish, StopOptions};
use hv_types::{InstanceId, InstanceRecord, Invalid, Revision};
use pbjson_types::Empty;
use tonic::{Request, Response, Status, Streaming};

use super::request::{failed, id, mutation, refuse};
use super::watch::{Piece, View, watch};
use super::{ReplyStream, Shared, empty, images, interactive, migration, pulls, snapshots, updates};

pub(crate) struct Service(pub(crate) Shared);

impl Service {
    fn cluster(&self) -> &Arc<Cluster> {
        &self.0.cluster
    }

    /// Changes what is wanted. `request` has its key cleared.
    async fn change(
        &self,
        method: &'static str,
        key: &str,
        request: &impl serde::Serialize,
        instance: &str,
        wish: Wish,
        stop: StopOptions,
    ) -> Result<Response<v1::Instance>, Status> {
        let mutation = mutation(method, key, request)?;
        let instance: InstanceId = id(instance)?;
        let done = self.cluster().change_instance(&mutation, &instance, wish, stop).await.map_err(failed)?;
        Ok(answered(done))
    }
}

/// The answer, with the revision at which the change was made where there was one.
fn answered(done: hv_cluster::Done<v1::Instance>) -> Response<v1::Instance> {
    let mut instance = done.reply;
    if instance.revision == 0 {
        instance.revision = done.revision.0;
    }
    Response::new(instance)
}

fn template(template: Option<v1::CreateInstanceRequest>) -> Result<v1::CreateInstanceRequest, Status> {
    template.ok_or_else(|| refuse(Invalid::new("template", "", "must be given")))
}

fn stop_options(force: bool, timeout_seconds: i32) -> Result<StopOptions, Status> {
    let timeout_seconds = match u32::try_from(timeout_seconds) {
        Ok(0) => StopOptions::DEFAULT_TIMEOUT_SECONDS,
        Ok(seconds) if seconds <= StopOptions::MAX_TIMEOUT_SECONDS => seconds,
        _ => {
            let expected = format!("must be between 0 and {}", StopOptions::MAX_TIMEOUT_SECONDS);
            return Err(refuse(Invalid::new("timeout_seconds", timeout_seconds, expected)));
        }
    };
    Ok(StopOptions { force, timeout_seconds })
}

/// Takes the key out of a request, so that the rest of it can be compared.
macro_rules! take_key {
    ($request:ident) => {
        std::mem::take(&mut $request.request_key)
    };
}

#[tonic::async_trait]
impl ComputeService for Service {
    type WatchInstanceStream = ReplyStream<v1::InstanceEvent>;
    type WatchInstancesStream = ReplyStream<v1::InstanceEvent>;
    type AttachConsoleStream = ReplyStream<v1::ConsoleData>;
    type ConsoleStream = ReplyStream<v1::ConsoleData>;
    type ExecStream = ReplyStream<v1::ExecOutput>;
    type GetInstanceLogsStream = ReplyStream<v1::LogChunk>;
    type PullImageStream = ReplyStream<v1::PullImageProgress>;

    async fn create_instance(
        &self,
        request: Request<v1::CreateInstanceRequest>,
    ) -> Result<Response<v1::Instance>, Status> {
        let mut request = request.into_inner();
        let key = take_key!(request);
        let mutation = mutation("ComputeService/CreateInstance", &key, &request)?;
        let record = convert::create_request_from(request).map_err(refuse)?;
        let done = self.cluster().create_instance(&mutation, record).await.map_err(failed)?;
        metrics::counter!("hypervisor_creates_total").increment(1);
        Ok(answered(done))
    }

    async fn create_instances(
        &self,
        request: Request<v1::CreateInstancesRequest>,
    ) -> Result<Response<v1::CreateInstancesResponse>, Status> {
        let mut request = request.into_inner();
        let key = request.template.as_mut().map(|template| take_key!(template)).unwrap_or_default();
        let mutation = mutation("ComputeService/CreateInstances", &key, &request)?;
        let count = usize::try_from(request.count).unwrap_or(usize::MAX);
        let template = convert::create_request_from(template(request.template)?).map_err(refuse)?;
        let done = self.cluster().create_instances(&mutation, template, count).await.map_err(failed)?;
        metrics::counter!("hypervisor_creates_total").increment(done.reply.instances.len() as u64);
        Ok(Response::new(v1::CreateInstancesResponse { revision: done.revision.0, ..done.reply }))
    }

    async fn explain_instance(
        &self,
        request: Request<v1::ExplainInstanceRequest>,
    ) -> Result<Response<v1::PlacementExplanation>, Status> {
        let instance: InstanceId = id(&request.into_inner().instance_id)?;
        Ok(Response::new(self.cluster().explain_instance(&instance).await.map_err(failed)?))
    }

    async fn preview_placement(
        &self,
        request: Request<v1::PreviewPlacementRequest>,
    ) -> Result<Response<v1::PreviewPlacementResponse>, Status> {
        let request = request.into_inner();
        let mut template = template(request.template)?;
        if template.name.is_empty() {
            template.name = "preview".into();
        }
        let record = convert::create_request_from(template).map_err(refuse)?;
        let count = request.count.max(1);
        Ok(Response::new(self.cluster().preview_placement(record, count).await.map_err(failed)?))
    }

    async fn delete_instance(
        &self,
        request: Request<v1::DeleteInstanceRequest>,
    ) -> Result<Response<Empty>, Status> {
        let mut request = request.into_inner();
        let key = take_key!(request);
        let stop = StopOptions { force: request.force, ..StopOptions::default() };
        let instance = request.instance_id.clone();
        self.change("ComputeService/DeleteInstance", &key, &request, &instance, Wish::Delete, stop).await?;
        Ok(Response::new(empty()))
    }

    async fn get_instance(
        &self,
        request: Request<v1::GetInstanceRequest>,
    ) -> Result<Response<v1::Instance>, Status> {
        let instance = id(&request.into_inner().instance_id)?;
        let record = self.cluster().instance(&instance).await.map_err(failed)?;
        Ok(Response::new(convert::instance_to(&record)))
    }

    async fn list_instances(
        &self,
        request: Request<v1::ListInstancesRequest>,
    ) -> Result<Response<v1::ListInstancesResponse>, Status> {
        let request = request.into_inner();
        let selector = convert::selector_from(request.label_selector).map_err(refuse)?;
        let bound_to = (
            ("instances", request.r#type, request.state, &request.node_id, selector.requirements()),
            (&request.project, &request.reference),
        );
        let page = Page::new(request.page_size, &request.page_token, &bound_to).map_err(refuse)?;
        let filter = Filter {
            instance_type: convert::instance_type_from(request.r#type).map_err(refuse)?,
            state: convert::state_from(request.state).map_err(refuse)?,
            node: if request.node_id.is_empty() { None } else { Some(id(&request.node_id)?) },
            selector,
            project: request.project,
            reference: request.reference,
        };
        let listed = self.cluster().instances(&filter, &page).await.map_err(failed)?;
        Ok(Response::new(v1::ListInstancesResponse {
            instances: listed.instances,
            next_page_token: listed.next_page_token,
            total_count: i32::try_from(listed.total).unwrap_or(i32::MAX),
            revision: listed.revision.0,
        }))
    }

    async fn start_instance(
        &self,
        request: Request<v1::StartInstanceRequest>,
    ) -> Result<Response<v1::Instance>, Status> {
        let mut request = request.into_inner();
        let key = take_key!(request);
        let (method, stop) = ("ComputeService/StartInstance", StopOptions::default());
        self.change(method, &key, &request, &request.instance_id, Wish::Start, stop).await
    }

    async fn stop_instance(
        &self,
        request: Request<v1::StopInstanceRequest>,
    ) -> Result<Response<v1::Instance>, Status> {
        let mut request = request.into_inner();
        let key = take_key!(request);
        let stop = stop_options(request.force, request.timeout_seconds)?;
        self.change("ComputeService/StopInstance", &key, &request, &request.instance_id, Wish::Stop, stop)
            .await
    }

    async fn restart_instance(
        &self,
        request: Request<v1::RestartInstanceRequest>,
    ) -> Result<Response<v1::Instance>, Status> {
        let mut request = request.into_inner();
        let key = take_key!(request);
        let stop = StopOptions { force: request.force, ..StopOptions::default() };
        self.change(
            "ComputeService/RestartInstance",
            &key,
            &request,
            &request.instance_id,
            Wish::Restart,
            stop,
        )
        .await
    }

    async fn pause_instance(
        &self,
        request: Request<v1::PauseInstanceRequest>,
    ) -> Result<Response<v1::Instance>, Status> {
        let mut request = request.into_inner();
        let key = take_key!(request);
        let (method, stop) = ("ComputeService/PauseInstance", StopOptions::default());
        self.change(method, &key, &request, &request.instance_id, Wish::Pause, stop).await
    }

    async fn resume_instance(
        &self,
        request: Request<v1::ResumeInstanceRequest>,
    ) -> Result<Response<v1::Instance>, Status> {
        let mut request = request.into_inner();
        let key = take_key!(request);
        let (method, stop) = ("ComputeService/ResumeInstance", StopOptions::default());
        self.change(method, &key, &request, &request.instance_id, Wish::Resume, stop).await
    }

    async fn update_instance_metadata(
        &self,
        request: Request<v1::UpdateInstanceMetadataRequest>,
    ) -> Result<Response<v1::Instance>, Status> {
        let mut request = request.into_inner();
        let key = take_key!(request);
        let mutation = mutation("ComputeService/UpdateInstanceMetadata", &key, &request)?;
        let instance: InstanceId = id(&request.instance_id)?;
        let if_revision = (request.if_revision != 0).then_some(Revision(request.if_revision));
        let metadata = convert::metadata_from(request.metadata);
        let done = self
            .cluster()
            .update_metadata(&mutation, &instance, metadata, if_revision)
            .await
            .map_err(failed)?;
        Ok(answered(done))
    }

    async fn get_instance_stats(
        &self,
        request: Request<v1::GetInstanceStatsRequest>,
    ) -> Result<Response<v1::InstanceStats>, Status> {
        interactive::stats(&self.0, request.into_inner()).await
    }

    async fn watch_instance(
        &self,
        request: Request<v1::WatchInstanceRequest>,
    ) -> Result<Response<Self::WatchInstanceStream>, Status> {
        let request = request.into_inner();
        let instance: InstanceId = id(&request.instance_id)?;
        if request.from_revision == 0 {
            self.cluster().instance(&instance).await.map_err(failed)?;
        }
        let view = InstanceView { filter: Filter::default(), only: Some(instance) };
        Ok(self.0.until_stop(watch(self.cluster().clone(), view, request.from_revision).await?))
    }

    async fn watch_instances(
        &self,
        request: Request<v1::WatchInstancesRequest>,
    ) -> Result<Response<Self::WatchInstancesStream>, Status> {
        let request = request.into_inner();
        let filter = Filter {
            instance_type: convert::instance_type_from(request.r#type).map_err(refuse)?,
            node: if request.node_id.is_empty() { None } else { Some(id(&request.node_id)?) },
            selector: convert::selector_from(request.label_selector).map_err(refuse)?,
            project: request.project,
            ..Filter::default()
        };
        let view = InstanceView { filter, only: None };
        Ok(self.0.until_stop(watch(self.cluster().clone(), view, request.from_revision).await?))
    }

    async fn attach_console(
        &self,
        request: Request<v1::AttachConsoleRequest>,
    ) -> Result<Response<Self::AttachConsoleStream>, Status> {
        interactive::attach_console(&self.0, request.into_inner()).await
    }

    async fn console(
        &self,
        request: Request<Streaming<v1::ConsoleInput>>,
    ) -> Result<Response<Self::ConsoleStream>, Status> {
        interactive::console(&self.0, request.into_inner()).await
    }

    async fn exec(
        &self,
        request: Request<Streaming<v1::ExecInput>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        interactive::exec(&self.0, request.into_inner()).await
    }

    async fn get_instance_logs(
        &self,
        request: Request<v1::GetInstanceLogsRequest>,
    ) -> Result<Response<Self::GetInstanceLogsStream>, Status> {
        interactive::logs(&self.0, request.into_inner()).await
    }

    async fn list_images(
        &self,
        request: Request<v1::ListImagesRequest>,
    ) -> Result<Response<v1::ListImagesResponse>, Status> {
        images::list(&self.0, request).await
    }

    async fn update_instance(
        &self,
        request: Request<v1::UpdateInstanceRequest>,
    ) -> Result<Response<v1::Instance>, Status> {
        updates::update(&self.0, request).await
    }

    async fn create_instance_snapshot(
        &self,
        request: Request<v1::CreateInstanceSnapshotRequest>,
    ) -> Result<Response<v1::Operation>, Status> {
        snapshots::create(&self.0, request).await
    }

    async fn clone_instance(
        &self,
        request: Request<v1::CloneInstanceRequest>,
    ) -> Result<Response<v1::CloneInstanceResponse>, Status> {
        snapshots::clone(&self.0, request).await
    }

    async fn list_instance_snapshots(
        &self,
        request: Request<v1::ListInstanceSnapshotsRequest>,
    ) -> Result<Response<v1::ListInstanceSnapshotsResponse>, Status> {
        snapshots::list(&self.0, request).await
    }

    async fn delete_instance_snapshot(
        &self,
        request: Request<v1::DeleteInstanceSnapshotRequest>,
    ) -> Result<Response<v1::Operation>, Status> {
        snapshots::delete(&self.0, request).await
    }

    async fn revert_instance(
        &self,
        request: Request<v1::RevertInstanceRequest>,
    ) -> Result<Response<v1::Operation>, Status> {
        snapshots::revert(&self.0, request).await
    }

    async fn migrate_instance(
        &self,
        request: Request<v1::MigrateInstanceRequest>,
    ) -> Result<Response<v1::Operation>, Status> {
        migration::migrate(&self.0, request).await
    }

    async fn pull_image(
        &self,
        request: Request<v1::PullImageRequest>,
    ) -> Result<Response<Self::PullImageStream>, Status> {
        pulls::pull(&self.0, request).await
    }

    async fn get_image(&self, request: Request<v1::GetImageRequest>) -> Result<Response<v1::Image>, Status> {
        images::get(&self.0, request).await
    }

    async fn delete_image(
        &self,
        request: Request<v1::DeleteImageRequest>,
    ) -> Result<Response<v1::DeleteImageResponse>, Status> {
        images::delete(&self.0, request).await
    }

    async fn upload_image(
        &self,
        request: Request<Streaming<v1::UploadImageRequest>>,
    ) -> Result<Response<v1::Image>, Status> {
        images::upload(&self.0, request).await
    }

    async fn collect_images(
        &self,
        request: Request<v1::CollectImagesRequest>,
    ) -> Result<Response<v1::CollectImagesResponse>, Status> {
        images::collect(&self.0, request).await
    }
}

/// How many instances a watch's first list looks at, and holds, at once.
const PIECE: usize = 1000;

/// A watch of instances.
struct InstanceView {
    filter: Filter,
    /// The only one that the watch is about; it ends with its deletion.
    only: Option<InstanceId>,
}

fn event(kind: v1::EventType, record: &InstanceRecord, revision: Revision) -> v1::InstanceEvent {
    let instance = match kind {
        v1::EventType::Deleted => {
            v1::Instance { id: record.id.to_string(), name: record.name.clone(), ..v1::Instance::default() }
        }
        _ => convert::instance_to(record),
    };
    v1::InstanceEvent { r#type: kind.into(), instance: Some(instance), revision: revision.0 }
}

fn gone(id: &InstanceId, revision: Revision) -> v1::InstanceEvent {
    let instance = v1::Instance { id: id.to_string(), ..v1::Instance::default() };
    v1::InstanceEvent {
        r#type: v1::EventType::Deleted.into(),
        instance: Some(instance),
        revision: revision.0,
    }
}

impl View for InstanceView {
    type Event = v1::InstanceEvent;

    fn initial(&self, _: &Cluster, state: &State) -> Vec<v1::InstanceEvent> {
        let Some(only) = &self.only else { return Vec::new() };
        match state.instance(only) {
            Some(record) => vec![event(v1::EventType::Added, &state.view(record), record.revision)],
            // It went between the caller's question and now.
            None => vec![gone(only, state.revision())],
        }
    }

    fn piece(&self, cluster: &Cluster, after: Option<&InstanceId>) -> Piece<v1::InstanceEvent> {
        if self.only.is_some() {
            let (events, revision) =
                cluster.cache().read(|state| (self.initial(cluster, state), state.revision()));
            return Piece { events, next: None, revision };
        }
        let chunk = cluster.cache().read(|state| state.instances_matching(&self.filter, after, PIECE, PIECE));
        let shown = |candidate: Candidate| event(v1::EventType::Added, &candidate.shown(), Revision(0));
        let events = chunk.found.into_iter().map(shown).collect();
        Piece { events, next: chunk.next, revision: chunk.revision }
    }

    fn object<'a>(&self, event: &'a v1::InstanceEvent) -> Option<&'a str> {
        event.instance.as_ref().map(|instance| instance.id.as_str())
    }

    fn changes(&self, _cluster: &Cluster, batch: &Batch) -> Vec<v1::InstanceEvent> {
        if batch.deltas.is_empty() {
            return Vec::new();
        }
        let meant = |at: &usize| match (&self.only, &batch.deltas[*at]) {
            (Some(only), Delta::Instance { id, .. }) => id == only,
            _ => true,
        };
        let seen = (0..batch.deltas.len()).filter(meant).filter_map(|at| self.filter.see(batch, at));
        seen.map(|seen| match seen {
            Seen::Added(record) => event(v1::EventType::Added, &record, batch.revision),
            Seen::Modified(record) => event(v1::EventType::Modified, &record, batch.revision),
            Seen::Deleted(record) => event(v1::EventType::Deleted, &record, batch.revision),
        })
        .collect()
    }

    fn set_revision(&self, event: &mut v1::InstanceEvent, revision: Revision) {
        event.revision = revision.0;
    }

    fn bookmark(&self, revision: Revision) -> Option<v1::InstanceEvent> {
        // A watch of one instance is as the reference's: the instance, then its changes, and nothing else.
        let bookmark = v1::InstanceEvent {
            r#type: v1::EventType::Bookmark.into(),
            instance: None,
            revision: revision.0,
        };
        self.only.is_none().then_some(bookmark)
    }

    fn is_last(&self, event: &v1::InstanceEvent) -> bool {
        self.only.is_some() && event.r#type == i32::from(v1::EventType::Deleted)
    }
}

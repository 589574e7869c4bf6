//! The fake's ComputeService.

use bytes::Bytes;
use futures::StreamExt;
use hv_proto::v1::compute_service_server::ComputeService;
use hv_proto::v1::{self, EventType, InstanceState, InstanceWanted, console_input, exec_input, exec_output};
use hv_types::ErrorCode;
use pbjson_types::Empty;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{BroadcastStream, ReceiverStream};
use tonic::{Request, Response, Streaming, async_trait};

use super::{Answer, Service, Streamed, images, status};

/// Instances per page, small so that paging is used.
const PAGE_SIZE: usize = 2;

impl Service {
    /// First what there is, then (unless the watch is of one instance) a bookmark, then what comes.
    fn watch(
        &self,
        matches: impl Fn(&v1::Instance) -> bool + Send + Sync + 'static,
        bookmark: bool,
    ) -> Streamed<v1::InstanceEvent> {
        let model = self.0.lock();
        let changes = BroadcastStream::new(model.changes.subscribe());
        let present = model.instances.values().filter(|instance| matches(instance)).cloned();
        let added = |instance| v1::InstanceEvent {
            r#type: EventType::Added as i32,
            instance: Some(instance),
            revision: 1,
        };
        let mut first: Vec<_> = present.map(added).map(Ok).collect();
        if bookmark {
            first.push(Ok(v1::InstanceEvent {
                r#type: EventType::Bookmark as i32,
                instance: None,
                revision: 1,
            }));
        }
        if model.script.short_watches {
            return Box::pin(tokio_stream::iter(first));
        }
        let changes = changes.filter_map(move |event| {
            let event = event.ok().filter(|event| event.instance.as_ref().is_some_and(&matches));
            std::future::ready(event.map(Ok))
        });
        Box::pin(tokio_stream::iter(first).chain(changes))
    }
}

#[async_trait]
impl ComputeService for Service {
    type WatchInstanceStream = Streamed<v1::InstanceEvent>;
    type WatchInstancesStream = Streamed<v1::InstanceEvent>;
    type AttachConsoleStream = Streamed<v1::ConsoleData>;
    type ConsoleStream = Streamed<v1::ConsoleData>;
    type PullImageStream = Streamed<v1::PullImageProgress>;
    type ExecStream = Streamed<v1::ExecOutput>;
    type GetInstanceLogsStream = Streamed<v1::LogChunk>;

    async fn create_instance(&self, request: Request<v1::CreateInstanceRequest>) -> Answer<v1::Instance> {
        self.note(&request);
        let request = request.into_inner();
        hv_proto::convert::create_request_from(request.clone())
            .map_err(|invalid| status(ErrorCode::InvalidArgument, invalid.to_string()))?;
        let mut model = self.0.lock();
        if let Some(answer) = model.answers.get(&request.request_key) {
            return Ok(Response::new(answer.clone()));
        }
        if model.instances.values().any(|instance| instance.name == request.name) {
            let message = format!("instance {:?} exists already", request.name);
            return Err(status(ErrorCode::AlreadyExists, message));
        }
        let instance = v1::Instance {
            id: format!("new-{}", request.name),
            name: request.name,
            r#type: request.r#type,
            state: InstanceState::Pending as i32,
            wanted: InstanceWanted::Running as i32,
            spec: request.spec,
            metadata: request.metadata,
            node_id: request.preferred_node_id,
            project: "default".into(),
            generation: 1,
            ..Default::default()
        };
        let answer = model.store(instance);
        model.mutations.push(("create", request.request_key.clone()));
        model.answers.insert(request.request_key, answer.clone());
        self.settle(&mut model, &answer);
        self.answered(&mut model)?;
        Ok(Response::new(answer))
    }

    async fn create_instances(
        &self,
        request: Request<v1::CreateInstancesRequest>,
    ) -> Answer<v1::CreateInstancesResponse> {
        let request = request.into_inner();
        let template = request.template.unwrap_or_default();
        hv_proto::convert::create_request_from(template.clone())
            .map_err(|invalid| status(ErrorCode::InvalidArgument, invalid.to_string()))?;
        let mut model = self.0.lock();
        model.mutations.push(("create-set", template.request_key.clone()));
        let mut instances = Vec::new();
        for number in 1..=request.count {
            let name = format!("{}-{number}", template.name);
            let instance = v1::Instance {
                id: format!("new-{name}"),
                name: name.clone(),
                r#type: template.r#type,
                state: InstanceState::Pending as i32,
                wanted: InstanceWanted::Running as i32,
                spec: template.spec.clone(),
                placement: template.placement.clone(),
                restart_policy: template.restart_policy,
                failover_policy: template.failover_policy,
                set: template.name.clone(),
                generation: 1,
                ..Default::default()
            };
            let answer = model.store(instance);
            self.settle(&mut model, &answer);
            instances.push(v1::CreatedInstance { id: answer.id, name, node_id: String::new() });
        }
        Ok(Response::new(v1::CreateInstancesResponse { instances, revision: 1 }))
    }

    async fn explain_instance(
        &self,
        _: Request<v1::ExplainInstanceRequest>,
    ) -> Answer<v1::PlacementExplanation> {
        Ok(Response::new(explanation()))
    }

    async fn preview_placement(
        &self,
        request: Request<v1::PreviewPlacementRequest>,
    ) -> Answer<v1::PreviewPlacementResponse> {
        let count = request.get_ref().count;
        Ok(Response::new(v1::PreviewPlacementResponse {
            nodes: vec![v1::PreviewedNode {
                node_id: "node-a-id".into(),
                hostname: "alpha".into(),
                count: 1,
            }],
            unplaced: count.saturating_sub(1),
            explanation: Some(explanation()),
        }))
    }

    async fn delete_instance(&self, request: Request<v1::DeleteInstanceRequest>) -> Answer<Empty> {
        let request = request.into_inner();
        self.change("delete", (&request.instance_id, &request.request_key), |instance| {
            instance.set_wanted(InstanceWanted::Deleted);
            Ok(())
        })?;
        Ok(Response::new(Empty {}))
    }

    async fn get_instance(&self, request: Request<v1::GetInstanceRequest>) -> Answer<v1::Instance> {
        self.0.lock().get(&request.get_ref().instance_id).map(Response::new)
    }

    async fn list_instances(
        &self,
        request: Request<v1::ListInstancesRequest>,
    ) -> Answer<v1::ListInstancesResponse> {
        self.note(&request);
        let request = request.into_inner();
        let model = self.0.lock();
        let matches = |instance: &&v1::Instance| {
            let labels = instance.metadata.clone().unwrap_or_default().labels;
            let labelled = |(key, value): (&String, &String)| {
                labels.get(key).is_some_and(|has| value == "*" || has == value)
            };
            (request.r#type == 0 || instance.r#type == request.r#type)
                && (request.state == 0 || instance.state == request.state)
                && (request.node_id.is_empty() || instance.node_id == request.node_id)
                && request.label_selector.iter().all(labelled)
                && (request.reference.is_empty()
                    || instance.name == request.reference
                    || instance.id.starts_with(&request.reference))
        };
        let found: Vec<v1::Instance> = model.instances.values().filter(matches).cloned().collect();
        let from: usize = request.page_token.parse().unwrap_or_default();
        let instances: Vec<_> = found.iter().skip(from).take(PAGE_SIZE).cloned().collect();
        let next = from + instances.len();
        Ok(Response::new(v1::ListInstancesResponse {
            instances,
            next_page_token: if next < found.len() { next.to_string() } else { String::new() },
            total_count: i32::try_from(found.len()).unwrap(),
            revision: 7,
        }))
    }

    async fn start_instance(&self, request: Request<v1::StartInstanceRequest>) -> Answer<v1::Instance> {
        let request = request.into_inner();
        let change = |instance: &mut v1::Instance| {
            instance.set_wanted(InstanceWanted::Running);
            instance.set_state(InstanceState::Starting);
            Ok(())
        };
        self.change("start", (&request.instance_id, &request.request_key), change).map(Response::new)
    }

    async fn stop_instance(&self, request: Request<v1::StopInstanceRequest>) -> Answer<v1::Instance> {
        let request = request.into_inner();
        let method = if request.force { "stop --force" } else { "stop" };
        let change = |instance: &mut v1::Instance| {
            instance.set_wanted(InstanceWanted::Stopped);
            instance.set_state(InstanceState::Stopping);
            Ok(())
        };
        self.change(method, (&request.instance_id, &request.request_key), change).map(Response::new)
    }

    async fn restart_instance(&self, request: Request<v1::RestartInstanceRequest>) -> Answer<v1::Instance> {
        let request = request.into_inner();
        let change = |instance: &mut v1::Instance| {
            instance.set_wanted(InstanceWanted::Running);
            Ok(())
        };
        self.change("restart", (&request.instance_id, &request.request_key), change).map(Response::new)
    }

    async fn pause_instance(&self, request: Request<v1::PauseInstanceRequest>) -> Answer<v1::Instance> {
        let request = request.into_inner();
        let change = |instance: &mut v1::Instance| {
            if instance.state() != InstanceState::Running {
                return Err(status(ErrorCode::FailedPrecondition, "only a running instance can be paused"));
            }
            instance.set_wanted(InstanceWanted::Paused);
            Ok(())
        };
        self.change("pause", (&request.instance_id, &request.request_key), change).map(Response::new)
    }

    async fn resume_instance(&self, request: Request<v1::ResumeInstanceRequest>) -> Answer<v1::Instance> {
        let request = request.into_inner();
        let change = |instance: &mut v1::Instance| {
            instance.set_wanted(InstanceWanted::Running);
            Ok(())
        };
        self.change("resume", (&request.instance_id, &request.request_key), change).map(Response::new)
    }

    async fn update_instance_metadata(
        &self,
        request: Request<v1::UpdateInstanceMetadataRequest>,
    ) -> Answer<v1::Instance> {
        let request = request.into_inner();
        let mut model = self.0.lock();
        let mut instance = model.get(&request.instance_id)?;
        if request.if_revision != instance.revision {
            return Err(status(ErrorCode::Conflict, "it was changed meanwhile"));
        }
        instance.metadata = request.metadata;
        model.mutations.push(("metadata", request.request_key));
        Ok(Response::new(model.store(instance)))
    }

    async fn get_instance_stats(
        &self,
        request: Request<v1::GetInstanceStatsRequest>,
    ) -> Answer<v1::InstanceStats> {
        let instance = self.0.lock().get(&request.get_ref().instance_id)?;
        let stats = v1::InstanceStats {
            instance_id: instance.id,
            cpu_usage_percent: 12.34,
            memory_used_bytes: 100 << 20,
            ..Default::default()
        };
        Ok(Response::new(stats))
    }

    async fn watch_instance(
        &self,
        request: Request<v1::WatchInstanceRequest>,
    ) -> Answer<Self::WatchInstanceStream> {
        let id = request.into_inner().instance_id;
        self.0.lock().get(&id)?;
        Ok(Response::new(self.watch(move |instance| instance.id == id, false)))
    }

    async fn watch_instances(
        &self,
        _: Request<v1::WatchInstancesRequest>,
    ) -> Answer<Self::WatchInstancesStream> {
        Ok(Response::new(self.watch(|_| true, true)))
    }

    async fn attach_console(
        &self,
        _: Request<v1::AttachConsoleRequest>,
    ) -> Answer<Self::AttachConsoleStream> {
        Err(status(ErrorCode::Unsupported, "the fake cannot do this"))
    }

    async fn pull_image(&self, request: Request<v1::PullImageRequest>) -> Answer<Self::PullImageStream> {
        let request = request.into_inner();
        let mut model = self.0.lock();
        let is_known =
            model.mutations.iter().any(|(what, key)| *what == "pull" && *key == request.request_key);
        model.mutations.push(("pull", request.request_key.clone()));
        images::pull(request, is_known)
    }

    async fn update_instance(&self, _: Request<v1::UpdateInstanceRequest>) -> Answer<v1::Instance> {
        Err(status(ErrorCode::Unsupported, "the fake cannot do this"))
    }

    async fn create_instance_snapshot(
        &self,
        _: Request<v1::CreateInstanceSnapshotRequest>,
    ) -> Answer<v1::Operation> {
        Err(status(ErrorCode::Unsupported, "the fake cannot do this"))
    }

    async fn clone_instance(
        &self,
        request: Request<v1::CloneInstanceRequest>,
    ) -> Answer<v1::CloneInstanceResponse> {
        let request = request.into_inner();
        let mut model = self.0.lock();
        if request.snapshot != "warm" {
            return Err(status(ErrorCode::NotFound, "instance web has no such snapshot"));
        }
        model.mutations.push(("clone", request.request_key.clone()));
        let source = model.instances.get(&request.instance_id).cloned().unwrap_or_default();
        let origin = v1::CloneOrigin { instance_id: request.instance_id, snapshot: request.snapshot };
        let names: Vec<_> = match request.count {
            0 => vec![request.name],
            count => (1..=count).map(|number| format!("{}-{number}", request.name)).collect(),
        };
        let mut instances = Vec::new();
        for name in names {
            let instance = v1::Instance {
                id: format!("new-{name}"),
                name: name.clone(),
                state: InstanceState::Creating as i32,
                spec: Some(v1::InstanceSpec {
                    clone_of: Some(origin.clone()),
                    ..source.spec.clone().unwrap_or_default()
                }),
                generation: 1,
                ..source.clone()
            };
            let answer = model.store(instance);
            self.settle(&mut model, &answer);
            instances.push(v1::CreatedInstance { id: answer.id, name, node_id: answer.node_id });
        }
        Ok(Response::new(v1::CloneInstanceResponse { instances, revision: 7 }))
    }

    async fn list_instance_snapshots(
        &self,
        _: Request<v1::ListInstanceSnapshotsRequest>,
    ) -> Answer<v1::ListInstanceSnapshotsResponse> {
        Err(status(ErrorCode::Unsupported, "the fake cannot do this"))
    }

    async fn delete_instance_snapshot(
        &self,
        _: Request<v1::DeleteInstanceSnapshotRequest>,
    ) -> Answer<v1::Operation> {
        Err(status(ErrorCode::Unsupported, "the fake cannot do this"))
    }

    async fn revert_instance(&self, _: Request<v1::RevertInstanceRequest>) -> Answer<v1::Operation> {
        Err(status(ErrorCode::Unsupported, "the fake cannot do this"))
    }

    async fn migrate_instance(&self, _: Request<v1::MigrateInstanceRequest>) -> Answer<v1::Operation> {
        Err(status(ErrorCode::Unsupported, "the fake cannot do this"))
    }

    async fn get_image(&self, request: Request<v1::GetImageRequest>) -> Answer<v1::Image> {
        images::get(&request.into_inner().name)
    }

    async fn delete_image(
        &self,
        request: Request<v1::DeleteImageRequest>,
    ) -> Answer<v1::DeleteImageResponse> {
        images::delete(&request.into_inner().name)
    }

    async fn collect_images(
        &self,
        request: Request<v1::CollectImagesRequest>,
    ) -> Answer<v1::CollectImagesResponse> {
        Ok(Response::new(images::collect(&request.into_inner())))
    }

    async fn upload_image(&self, request: Request<Streaming<v1::UploadImageRequest>>) -> Answer<v1::Image> {
        images::upload(request.into_inner()).await
    }

    async fn list_images(&self, _: Request<v1::ListImagesRequest>) -> Answer<v1::ListImagesResponse> {
        let image = images::tiny();
        Ok(Response::new(v1::ListImagesResponse { images: vec![image], next_page_token: String::new() }))
    }

    /// Prints a history in two parts, then what is typed in upper case; sizes as text; `exit` closes it.
    async fn console(&self, request: Request<Streaming<v1::ConsoleInput>>) -> Answer<Self::ConsoleStream> {
        let mut input = request.into_inner();
        let (sender, receiver) = mpsc::channel(64);
        tokio::spawn(async move {
            let print =
                async |text: String| sender.send(Ok(v1::ConsoleData { data: Bytes::from(text) })).await;
            while let Ok(Some(message)) = input.message().await {
                let printed = match message.input {
                    Some(console_input::Input::Attach(attach)) => {
                        let size = attach.size.map(|size| format!("[{}x{}]", size.width, size.height));
                        let _ = print(format!("booted{}\r\nguest lo", size.unwrap_or_default())).await;
                        print("gin: ".into()).await
                    }
                    Some(console_input::Input::Data(data)) => {
                        let text = String::from_utf8_lossy(&data).to_uppercase();
                        if text.contains("EXIT") {
                            return;
                        }
                        print(text).await
                    }
                    Some(console_input::Input::Resize(size)) => {
                        print(format!("[{}x{}]", size.width, size.height)).await
                    }
                    None => Ok(()),
                };
                if printed.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    /// `exit N` ends with N; `cat` repeats its input; anything else prints its words, and a warning.
    async fn exec(&self, request: Request<Streaming<v1::ExecInput>>) -> Answer<Self::ExecStream> {
        let mut input = request.into_inner();
        let Some(exec_input::Input::Start(start)) = input.message().await?.and_then(|message| message.input)
        else {
            return Err(status(ErrorCode::InvalidArgument, "start comes first"));
        };
        let mut typed = Vec::new();
        while let Some(message) = input.message().await? {
            match message.input {
                Some(exec_input::Input::Stdin(bytes)) => typed.extend_from_slice(&bytes),
                Some(exec_input::Input::Eof(_)) => break,
                _ => {}
            }
        }
        let words: Vec<&str> = start.command.iter().map(String::as_str).collect();
        let (stdout, code) = match words[..] {
            ["exit", code] => (Vec::new(), code.parse().unwrap_or(1)),
            ["cat"] => (typed, 0),
            _ => (words.join(" ").into_bytes(), 0),
        };
        let outputs = [
            exec_output::Output::Stdout(stdout.into()),
            exec_output::Output::Stderr(Bytes::from_static(b"warning\n")),
            exec_output::Output::ExitCode(code),
        ];
        let outputs = outputs.map(|output| Ok(v1::ExecOutput { output: Some(output) }));
        Ok(Response::new(Box::pin(tokio_stream::iter(outputs))))
    }

    async fn get_instance_logs(
        &self,
        request: Request<v1::GetInstanceLogsRequest>,
    ) -> Answer<Self::GetInstanceLogsStream> {
        let request = request.into_inner();
        let text = format!("tail {} follow {}\n", request.tail_lines, request.follow);
        Ok(Response::new(Box::pin(tokio_stream::iter([Ok(v1::LogChunk { data: text.into() })]))))
    }
}

/// Two nodes, both too small.
fn explanation() -> v1::PlacementExplanation {
    v1::PlacementExplanation {
        total_nodes: 2,
        rejections: vec![v1::RuleRejection {
            rule: "Cpu".into(),
            nodes: 2,
            message: "with fewer than 8 free cores".into(),
            examples: vec!["alpha".into(), "beta".into()],
        }],
        summary: "none of 2 nodes can take it".into(),
        remedies: vec!["free 4 cores on alpha".into()],
        ..Default::default()
    }
}

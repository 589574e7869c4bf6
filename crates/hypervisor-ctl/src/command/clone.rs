//! `instance clone`.

use hv_proto::v1;
use hv_types::InstanceType;
use tokio::time::Instant;

use super::{Context, create};
use crate::cli::CloneArgs;
use crate::error::CtlError;
use crate::reference;
use crate::server::RequestKeys;

pub(super) async fn run(
    context: &Context,
    only: Option<InstanceType>,
    args: &CloneArgs,
) -> Result<u8, CtlError> {
    let server = &context.server;
    let began = Instant::now();
    let source = reference::instance(server, only, &args.source).await?;
    let request = v1::CloneInstanceRequest {
        instance_id: source.id,
        snapshot: args.snapshot.clone(),
        name: args.name.clone(),
        count: args.count.unwrap_or_default(),
        request_key: RequestKeys::new(&args.key).next(),
    };
    let answer = server.call(async || server.compute().clone_instance(request.clone()).await).await?;
    let clones = create::read(server, answer.instances).await?;
    create::follow(context, only, clones, args.wait.no_wait, began).await
}

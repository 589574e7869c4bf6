//! `instance explain` and `schedule`.

use hv_proto::v1;
use hv_types::InstanceType;

use super::{Context, create};
use crate::cli::{NameArgs, ScheduleArgs};
use crate::error::{CtlError, exit_code};
use crate::output::OutputFormat;
use crate::output::text::escape;
use crate::reference;
use crate::show::placement::{explanation, preview};

pub(super) async fn explain(
    context: &Context,
    only: Option<InstanceType>,
    args: &NameArgs,
) -> Result<u8, CtlError> {
    let server = &context.server;
    let instance = reference::instance(server, only, &args.name).await?;
    let request = v1::ExplainInstanceRequest { instance_id: instance.id };
    let answer = server.call(async || server.compute().explain_instance(request.clone()).await).await?;
    match context.output.format {
        OutputFormat::Json | OutputFormat::Yaml => context.output.message("the explanation", &answer)?,
        OutputFormat::Name if answer.node_id.is_empty() => {}
        OutputFormat::Name => context.output.line(format!("node/{}", escape(&answer.hostname)))?,
        OutputFormat::Table | OutputFormat::Wide => {
            context.output.print(&explanation(&answer, context.output).text())?;
        }
    }
    Ok(exit_code::OK)
}

/// Exits with 5 if something would wait, so that scripts can ask.
pub(super) async fn schedule(context: &Context, args: &ScheduleArgs) -> Result<u8, CtlError> {
    let server = &context.server;
    let template = create::template(server, None, &args.shape).await?;
    let request = v1::PreviewPlacementRequest { template: Some(template), count: args.count };
    let answer = server.call(async || server.compute().preview_placement(request.clone()).await).await?;
    match context.output.format {
        OutputFormat::Json | OutputFormat::Yaml => context.output.message("the preview", &answer)?,
        OutputFormat::Name => {
            for node in &answer.nodes {
                context.output.line(format!("node/{}", escape(&node.hostname)))?;
            }
        }
        OutputFormat::Table | OutputFormat::Wide => {
            context.output.print(&preview(&answer, context.output))?;
        }
    }
    Ok(if answer.unplaced == 0 { exit_code::OK } else { exit_code::PRECONDITION })
}

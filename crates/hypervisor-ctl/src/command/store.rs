//! `store …`.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use hv_proto::v1;
use tokio::io::AsyncReadExt;
use tonic::Streaming;

use super::Context;
use crate::cli::{StoreCommand, StoreCompactArgs, StoreDumpArgs, StoreFileArgs, StoreMigrateArgs};
use crate::error::{CtlError, exit_code};
use crate::output::OutputFormat;
use crate::output::text::{escape, size};
use crate::server::Server;
use crate::show::store::status as status_page;

/// How many bytes of a file travel in one message.
const CHUNK_BYTES: usize = 256 << 10;
/// How many messages wait to be sent.
const CHUNKS_AHEAD: usize = 4;
/// After how many bytes the progress is shown anew.
const PROGRESS_BYTES: u64 = 1 << 20;

pub(super) async fn run(context: &Context, command: StoreCommand) -> Result<u8, CtlError> {
    match command {
        StoreCommand::Status => status(context).await,
        StoreCommand::Backup(args) => backup(context, &args).await,
        StoreCommand::Restore(args) => restore(context, &args).await,
        StoreCommand::Dump(args) => dump(context, &args).await,
        StoreCommand::Compact(args) => compact(context, &args).await,
        StoreCommand::Migrate(args) => migrate(context, &args).await,
        StoreCommand::Freeze => freeze(context, true).await,
        StoreCommand::Unfreeze => freeze(context, false).await,
    }
}

async fn status(context: &Context) -> Result<u8, CtlError> {
    let server = &context.server;
    let request = v1::GetStoreStatusRequest {};
    show(context, &server.call(async || server.store().get_store_status(request).await).await?)
}

fn show(context: &Context, status: &v1::StoreStatus) -> Result<u8, CtlError> {
    match context.output.format {
        OutputFormat::Json | OutputFormat::Yaml => context.output.message("the store", status)?,
        OutputFormat::Name => context.output.line(format!("store/{}", escape(&status.backend)))?,
        OutputFormat::Table | OutputFormat::Wide => {
            context.output.print(&status_page(status, context.output).text())?;
        }
    }
    Ok(exit_code::OK)
}

async fn freeze(context: &Context, frozen: bool) -> Result<u8, CtlError> {
    show(context, &set_frozen(&context.server, frozen).await?)
}

/// Sets a state: repeating it does no harm.
async fn set_frozen(server: &Server, frozen: bool) -> Result<v1::StoreStatus, CtlError> {
    let request = v1::FreezeStoreRequest { frozen };
    server.call(async || server.store().freeze_store(request).await).await
}

/// Counts bytes on the progress line.
struct Count<'a> {
    progress: crate::progress::Progress,
    verb: &'a str,
    bytes: u64,
    shown: u64,
}

impl<'a> Count<'a> {
    fn new(context: &Context, verb: &'a str) -> Self {
        Self { progress: context.progress(), verb, bytes: 0, shown: 0 }
    }

    fn add(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
        if self.bytes >= self.shown + PROGRESS_BYTES {
            self.shown = self.bytes;
            self.progress.update(&format!("{} {}", self.verb, self.text()));
        }
    }

    fn text(&self) -> String {
        size(i64::try_from(self.bytes).unwrap_or(i64::MAX))
    }
}

async fn backup(context: &Context, args: &StoreFileArgs) -> Result<u8, CtlError> {
    let server = &context.server;
    let request = v1::BackupStoreRequest {};
    let mut stream = server.call(async || server.store().backup_store(request).await).await?;
    let mut count = Count::new(context, "written");
    if args.file == Path::new("-") {
        while let Some(chunk) = next(server, &mut stream).await? {
            crate::output::write_stdout(&chunk)?;
            count.add(chunk.len());
        }
        return Ok(exit_code::OK);
    }
    let failed = |source| CtlError::File { action: "write", path: args.file.clone(), source };
    let directory = args.file.parent().filter(|parent| !parent.as_os_str().is_empty());
    // Under its name only when it is whole; what is left of a failure is removed with it.
    let mut partial = tempfile::NamedTempFile::new_in(directory.unwrap_or(Path::new("."))).map_err(failed)?;
    while let Some(chunk) = next(server, &mut stream).await? {
        partial.write_all(&chunk).map_err(failed)?;
        count.add(chunk.len());
    }
    partial.as_file().sync_all().map_err(failed)?;
    partial.persist(&args.file).map_err(|error| failed(error.error))?;
    let text = count.text();
    drop(count);
    context.output.confirm(format!("{} written ({text})", args.file.display()))?;
    Ok(exit_code::OK)
}

async fn next(
    server: &Server,
    stream: &mut Streaming<v1::StoreChunk>,
) -> Result<Option<bytes::Bytes>, CtlError> {
    let chunk = stream.message().await.map_err(|status| server.error(&status))?;
    Ok(chunk.map(|chunk| chunk.data))
}

async fn restore(context: &Context, args: &StoreFileArgs) -> Result<u8, CtlError> {
    let server = &context.server;
    let (sender, chunks) = tokio::sync::mpsc::channel(CHUNKS_AHEAD);
    let path = args.file.clone();
    // It may be standard input, which cannot be read without a thread.
    let reading = tokio::task::spawn_blocking(move || read_file(&path, &sender));
    let request = tokio_stream::wrappers::ReceiverStream::new(chunks);
    context.progress().update("restoring");
    let answer = server.store().restore_store(request).await;
    if let Ok(Err(source)) = reading.await {
        return Err(CtlError::File { action: "read", path: args.file.clone(), source });
    }
    let answer = answer.map_err(|status| server.error(&status))?.into_inner();
    if !context.output.format.is_for_people() {
        context.output.message("the restore", &answer)?;
    }
    context.output.confirm(format!("{} records restored", answer.records))?;
    Ok(exit_code::OK)
}

fn read_file(path: &PathBuf, chunks: &tokio::sync::mpsc::Sender<v1::StoreChunk>) -> std::io::Result<()> {
    let mut file: Box<dyn Read> = if path == Path::new("-") {
        Box::new(std::io::stdin())
    } else {
        Box::new(std::fs::File::open(path)?)
    };
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        let count = file.read(&mut buffer)?;
        let chunk = v1::StoreChunk { data: bytes::Bytes::copy_from_slice(&buffer[..count]) };
        // The server refused meanwhile: its answer says why.
        if count == 0 || chunks.blocking_send(chunk).is_err() {
            return Ok(());
        }
    }
}

async fn dump(context: &Context, args: &StoreDumpArgs) -> Result<u8, CtlError> {
    let server = &context.server;
    let request = v1::DumpStoreRequest { key_prefix: args.prefix.clone() };
    let mut stream = server.call(async || server.store().dump_store(request.clone()).await).await?;
    while let Some(chunk) = next(server, &mut stream).await? {
        crate::output::write_stdout(&chunk)?;
    }
    Ok(exit_code::OK)
}

async fn compact(context: &Context, args: &StoreCompactArgs) -> Result<u8, CtlError> {
    let server = &context.server;
    let request = v1::CompactStoreRequest { defragment: args.defragment };
    let mut stream = server.call(async || server.store().compact_store(request).await).await?;
    let mut progress = context.progress();
    while let Some(step) = stream.message().await.map_err(|status| server.error(&status))? {
        progress.update(&format!("{}/{} {}", step.done, step.total, step.message));
    }
    progress.clear();
    context.output.confirm("the store is compacted")?;
    Ok(exit_code::OK)
}

/// Copies while nothing changes; what follows is the operator's.
async fn migrate(context: &Context, args: &StoreMigrateArgs) -> Result<u8, CtlError> {
    let (from, to) = (&context.server, context.server.elsewhere(&args.to)?);
    set_frozen(from, true).await?;
    match copy(context, from, &to).await {
        Ok(answer) => {
            context.output.confirm(format!(
                "{} records moved to {to}. {from} stays frozen: point agents and users at {to}, then stop {from}",
                answer.records,
                to = to.address(),
                from = from.address(),
            ))?;
            if !context.output.format.is_for_people() {
                context.output.message("the move", &answer)?;
            }
            Ok(exit_code::OK)
        }
        Err(error) => {
            set_frozen(from, false).await?;
            Err(error)
        }
    }
}

async fn copy(context: &Context, from: &Server, to: &Server) -> Result<v1::RestoreStoreResponse, CtlError> {
    let request = v1::BackupStoreRequest {};
    let mut stream = from.call(async || from.store().backup_store(request).await).await?;
    let mut count = Count::new(context, "copied");
    // Whole before the other side sees the first of it: it must not take over half of a backup.
    let failed = |source| CtlError::Stream { action: "keep the records in a temporary file", source };
    let mut file = tokio::fs::File::from_std(tempfile::tempfile().map_err(failed)?);
    while let Some(chunk) = next(from, &mut stream).await? {
        tokio::io::AsyncWriteExt::write_all(&mut file, &chunk).await.map_err(failed)?;
        count.add(chunk.len());
    }
    tokio::io::AsyncSeekExt::rewind(&mut file).await.map_err(failed)?;
    let (sender, chunks) = tokio::sync::mpsc::channel(CHUNKS_AHEAD);
    let sending = async move {
        let mut buffer = vec![0; CHUNK_BYTES];
        loop {
            let bytes = file.read(&mut buffer).await?;
            let chunk = v1::StoreChunk { data: bytes::Bytes::copy_from_slice(&buffer[..bytes]) };
            if bytes == 0 || sender.send(chunk).await.is_err() {
                return Ok::<_, std::io::Error>(());
            }
        }
    };
    let mut store = to.store();
    let request = tokio_stream::wrappers::ReceiverStream::new(chunks);
    let (sent, answer) = tokio::join!(sending, store.restore_store(request));
    sent.map_err(failed)?;
    Ok(answer.map_err(|status| to.error(&status))?.into_inner())
}

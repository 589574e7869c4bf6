//! From arguments to exit code: parses, loads the settings, runs the command, prints what went wrong.

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use hv_telemetry::{LogFormat, LogOptions, RequestId, error_chain};
use hv_types::ErrorCode;

use crate::cli::{Cli, Command, ConfigCommand, GlobalArgs};
use crate::command::{self, Context};
use crate::error::{CtlError, exit_code};
use crate::output::text::escape_lines;
use crate::output::{Output, OutputFormat};
use crate::server::{Server, request_id};
use crate::settings::Settings;

/// Runs the command line and returns what the process exits with.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(error) => return ExitCode::from(refuse(&arguments, &error)),
    };
    let request_id = request_id(cli.global.request_id.as_ref());
    // Errors take the form that the settings ask for as soon as these are known.
    let mut format = cli.global.output.unwrap_or_default();
    let code = match start(cli, &request_id, &mut format) {
        Ok(code) => code,
        Err(error) if error.is_broken_pipe() => exit_code::OK,
        Err(error) => {
            report(&error, &request_id, format);
            error.exit_code()
        }
    };
    ExitCode::from(code)
}

fn start(cli: Cli, request_id: &RequestId, format: &mut OutputFormat) -> Result<u8, CtlError> {
    let Cli { global, command } = cli;
    if let Some(level) = global.log_level {
        // The only subscriber of this process: it cannot have been set before.
        let _ = hv_telemetry::init(LogOptions { level, format: LogFormat::Text });
    }
    match command {
        Command::Version(args) if !args.server_version => {
            command::version::client_only(output(&global, *format))
        }
        Command::Completion(args) => command::document::completion(&args),
        Command::Man(args) => command::document::man(&args),
        Command::DocsMarkdown => {
            crate::output::write_stdout(crate::docs::markdown().as_bytes()).map(|()| exit_code::OK)
        }
        command => {
            let loaded = Settings::load(&global, std::env::vars_os())?;
            *format = loaded.value.ctl.output;
            if let Command::Config(ConfigCommand::Show) = command {
                return output(&global, *format).print(&loaded.to_table()).map(|()| exit_code::OK);
            }
            talk(&global, &loaded.value, request_id, command)
        }
    }
}

fn output(global: &GlobalArgs, format: OutputFormat) -> Output {
    Output::new(format, global.quiet)
}

/// Runs a command that needs the server.
fn talk(
    global: &GlobalArgs,
    settings: &Settings,
    request_id: &RequestId,
    command: Command,
) -> Result<u8, CtlError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| CtlError::Stream { action: "start the runtime", source })?;
    let result = runtime.block_on(request_id.clone().scope(async {
        let server = Server::new(settings)?;
        let context = Context { server, output: output(global, settings.ctl.output) };
        Box::pin(command::run(&context, command)).await
    }));
    // A thread that reads standard input would keep the runtime from ending.
    runtime.shutdown_background();
    result
}

/// Prints clap's refusal (or the help that was asked for), as JSON where that was asked for.
fn refuse(arguments: &[OsString], error: &clap::Error) -> u8 {
    if !error.use_stderr() {
        // Nobody is left to read it, or all is well.
        let _ = error.print();
        return exit_code::OK;
    }
    if wants_json(arguments) {
        let text = error.render().to_string();
        let first = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
        print_error(ErrorCode::InvalidArgument, first, None);
    } else {
        let _ = error.print();
    }
    exit_code::USAGE
}

/// Whether arguments that could not be parsed ask for JSON.
fn wants_json(arguments: &[OsString]) -> bool {
    let words: Vec<&str> = arguments.iter().filter_map(|argument| argument.to_str()).collect();
    words.iter().any(|word| matches!(*word, "-ojson" | "-o=json" | "--output=json"))
        || words.windows(2).any(|pair| matches!(pair, ["-o" | "--output", "json"]))
}

fn report(error: &CtlError, request_id: &RequestId, format: OutputFormat) {
    let message = error_chain(error);
    let id = error.has_request_id().then_some(request_id);
    if matches!(format, OutputFormat::Json | OutputFormat::Yaml) {
        print_error(error.code(), &message, id);
        return;
    }
    let mut text = format!("error: {}\n", escape_lines(&message));
    if let Some(id) = id {
        text.push_str(&format!("request id: {id}\n"));
    }
    // Nowhere is left to say that it cannot be said.
    let _ = io::stderr().write_all(text.as_bytes());
}

fn print_error(code: ErrorCode, message: &str, request_id: Option<&RequestId>) {
    let request_id = request_id.map(RequestId::as_str);
    let error = serde_json::json!({
        "error": { "code": code.name(), "message": message, "request_id": request_id }
    });
    let _ = writeln!(io::stderr(), "{error}");
}

//! The credentials that a kubeconfig names and does not hold: a token file, and the answer of a plugin.
//!
//! `kube` would read both. But it keeps the line end of a token file, which no header may hold, and waits for
//! a plugin for ever, three times for each client. So `kube` gets a token or a certificate. The client is
//! made anew when these are due: the token of a file after a minute, that of a plugin before it expires.

use std::convert::Infallible;
use std::fs::File;
use std::future::pending;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::AcqRel, Ordering::Release};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::jiff::Timestamp;
use kube::config::{AuthInfo, ExecConfig, ExecInteractiveMode};
use rustix::process::{Pid, Signal, kill_process_group};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use super::failure::ApiFailure;
use super::files::{OnSlow, read_file, read_files};
use crate::config::problem::ConfigPlace;
use crate::config::{free, yaml};
use crate::fleet::now;

/// The time limit of a credential plugin.
const PLUGIN_TIMEOUT: Duration = Duration::from_secs(15);

/// The interval between two looks whether a plugin that has closed its output has ended.
const EXIT_POLL_INTERVAL: Duration = Duration::from_millis(10);

/// A thread writes messages of a plugin to the balancer's standard error, which may not be read.
static IS_WRITING_ERRORS: AtomicBool = AtomicBool::new(false);

/// The largest output of a credential plugin.
const MAX_PLUGIN_BYTES: u64 = 1 << 20;

/// The most of a plugin's standard error that is kept; the rest is read and dropped.
const MAX_ERROR_BYTES: usize = 64 << 10;

/// The room for one read of a plugin's standard error.
const ERROR_READ_BYTES: usize = 4 << 10;

/// The time limit for writing a plugin's standard error to that of the balancer.
const ERROR_WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// What is written behind a standard error that was cut.
const ERROR_CUT: &[u8] = b"\n... (the plugin wrote more than is shown)\n";

/// The largest token file.
const MAX_TOKEN_BYTES: u64 = 64 << 10;

/// The time after which a token file is read again.
const MAX_TOKEN_AGE: Duration = Duration::from_secs(60);

/// The time before the end of a plugin's token at which the plugin is run again.
const EXPIRY_MARGIN: Duration = Duration::from_secs(10);

/// The key under which an `auth-provider` names a command.
const PROVIDER_COMMAND: &str = "cmd-path";

/// A plugin that runs, in a process group of its own. The group is killed when this is dropped before the
/// plugin has ended.
struct PluginProcess {
    /// `None` once the plugin has ended and its number may belong to another process.
    child: Option<Child>,
    /// The beginning of the standard error: at most one byte more than is shown.
    errors: Vec<u8>,
}

/// The pipes from a plugin.
struct PluginOutput {
    standard: pipe::Receiver,
    errors: pipe::Receiver,
}

/// What a plugin prints.
#[derive(Deserialize)]
struct PluginAnswer {
    status: PluginCredential,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PluginCredential {
    token: Option<String>,
    client_certificate_data: Option<String>,
    client_key_data: Option<String>,
    expiration_timestamp: Option<String>,
}

/// Replaces a token file or a credential plugin by what it gives. Returns when to read again.
pub(super) async fn resolve(auth: &mut AuthInfo, on_slow: OnSlow<'_>) -> Result<Option<Instant>, ApiFailure> {
    if let Some(provider) = &auth.auth_provider {
        if provider.config.contains_key(PROVIDER_COMMAND) {
            let why = format!("the kubeconfig has an auth-provider with {PROVIDER_COMMAND}: use exec");
            return Err(ApiFailure::Unreached(why));
        }
        return Ok(None);
    }
    if auth.token.is_some() || auth.username.is_some() && auth.password.is_some() {
        return Ok(None);
    }
    if let Some(path) = auth.token_file.take() {
        auth.token = Some(token(path, on_slow).await?.into());
        return Ok(Some(now() + MAX_TOKEN_AGE));
    }
    let Some(exec) = auth.exec.take() else { return Ok(None) };
    Ok(answer(&exec, PLUGIN_TIMEOUT).await?.put_into(auth))
}

/// Reads a token file.
async fn token(path: String, on_slow: OnSlow<'_>) -> Result<String, ApiFailure> {
    let unusable = |path: &str, why: &str| ApiFailure::Unreached(format!("token file {path}: {why}"));
    let path_read = path.clone();
    let read = read_files(move || read_file(Path::new(&path_read), MAX_TOKEN_BYTES), on_slow).await;
    let text = read.and_then(|read| read.map_err(|error| error.to_string()));
    let text = text.map_err(|why| unusable(&path, &why))?;
    match text.trim() {
        "" => Err(unusable(&path, "it is empty")),
        token => Ok(token.to_string()),
    }
}

/// Runs a credential plugin.
async fn answer(exec: &ExecConfig, limit: Duration) -> Result<PluginCredential, ApiFailure> {
    if exec.interactive_mode == Some(ExecInteractiveMode::Always) {
        let why = "the credential plugin requires a terminal (interactiveMode: Always)";
        return Err(ApiFailure::Unreached(why.into()));
    }
    let (mut process, output) = PluginProcess::start(exec).map_err(|error| broken(&error))?;
    let ran = tokio::time::timeout(limit, process.run(output)).await;
    let errors = std::mem::take(&mut process.errors);
    // What is left of the plugin ends now, however long its messages take.
    drop(process);
    pass_errors(errors).await;
    let (output, status) =
        ran.map_err(|_| ApiFailure::PluginHangs(limit))?.map_err(|error| broken(&error))?;
    if !status.success() {
        return Err(ApiFailure::Unreached(format!("the credential plugin failed: {status}")));
    }
    let invalid = "the credential plugin printed no valid ExecCredential";
    PluginCredential::parse(&output).ok_or_else(|| ApiFailure::Unreached(invalid.into()))
}

/// Writes what a plugin wrote to its standard error to that of the balancer. Where that is not read, one
/// write waits, and later ones are left out.
async fn pass_errors(errors: Vec<u8>) {
    if !errors.is_empty() && !IS_WRITING_ERRORS.swap(true, AcqRel) {
        let write = move || {
            let written = std::io::stderr().write_all(&shown(errors));
            IS_WRITING_ERRORS.store(false, Release);
            written
        };
        tokio::time::timeout(ERROR_WRITE_TIMEOUT, tokio::task::spawn_blocking(write)).await.ok();
    }
}

/// The standard error of a plugin as it is written to that of the balancer.
fn shown(mut errors: Vec<u8>) -> Vec<u8> {
    if errors.len() > MAX_ERROR_BYTES {
        errors.truncate(MAX_ERROR_BYTES);
        errors.extend_from_slice(ERROR_CUT);
    } else if !errors.ends_with(b"\n") {
        errors.push(b'\n');
    }
    errors
}

fn broken(error: &io::Error) -> ApiFailure {
    ApiFailure::Unreached(format!("the credential plugin cannot be run: {error}"))
}

/// Returns the object that a plugin gets in `KUBERNETES_EXEC_INFO`.
fn exec_info(exec: &ExecConfig) -> Value {
    let mut spec = json!({"interactive": false});
    if let Some(cluster) = &exec.cluster {
        spec["cluster"] = json!(cluster);
    }
    json!({"kind": "ExecCredential", "apiVersion": exec.api_version, "spec": spec})
}

// === impl PluginProcess ===

impl PluginProcess {
    /// Starts a plugin.
    fn start(exec: &ExecConfig) -> io::Result<(Self, PluginOutput)> {
        let program = exec.command.as_ref().ok_or_else(|| io::Error::other("it names no command"))?;
        let mut command = Command::new(program);
        command.args(exec.args.iter().flatten());
        for variable in exec.env.iter().flatten() {
            if let (Some(name), Some(value)) = (variable.get("name"), variable.get("value")) {
                command.env(name, value);
            }
        }
        command.env("KUBERNETES_EXEC_INFO", exec_info(exec).to_string());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut child = command.spawn()?;
        let pipes = (child.stdout.take(), child.stderr.take());
        let process = PluginProcess { child: Some(child), errors: Vec::new() };
        let (Some(standard), Some(errors)) = pipes else {
            return Err(io::Error::other("it has no output"));
        };
        let standard = pipe::Receiver::from_owned_fd(standard.into())?;
        let errors = pipe::Receiver::from_owned_fd(errors.into())?;
        Ok((process, PluginOutput { standard, errors }))
    }

    /// Waits for the end of the plugin. Returns its output.
    async fn run(&mut self, output: PluginOutput) -> io::Result<(Vec<u8>, ExitStatus)> {
        let PluginProcess { child, errors: kept } = self;
        let PluginOutput { standard, mut errors } = output;
        let ended = tokio::select! {
            ended = wait_for_end(child, standard) => ended,
            // Other processes may hold the pipe for longer than the plugin lives.
            never = keep_errors(&mut errors, kept) => match never {},
        };
        // What the plugin wrote last may still be in the pipe, which has no end where another process holds
        // it.
        let room = error_room(kept) as u64;
        let pipe = errors.into_nonblocking_fd().map(File::from);
        pipe.and_then(|pipe| pipe.take(room).read_to_end(kept)).ok();
        ended
    }
}

/// Waits until a plugin has closed its output and has ended. Returns what it printed.
async fn wait_for_end(
    child: &mut Option<Child>,
    output: pipe::Receiver,
) -> io::Result<(Vec<u8>, ExitStatus)> {
    let mut bytes = Vec::new();
    output.take(MAX_PLUGIN_BYTES + 1).read_to_end(&mut bytes).await?;
    if bytes.len() as u64 > MAX_PLUGIN_BYTES {
        return Err(io::Error::other(format!("it printed more than {MAX_PLUGIN_BYTES} bytes")));
    }
    while let Some(running) = child {
        if let Some(status) = running.try_wait()? {
            *child = None;
            return Ok((bytes, status));
        }
        tokio::time::sleep(EXIT_POLL_INTERVAL).await;
    }
    Err(io::Error::other("it has ended before"))
}

/// Keeps the beginning of what a plugin writes to its standard error, and reads and drops the rest: a plugin
/// must not wait for room in the pipe.
async fn keep_errors(errors: &mut pipe::Receiver, kept: &mut Vec<u8>) -> Infallible {
    let mut buffer = vec![0; ERROR_READ_BYTES];
    while let Ok(count @ 1..) = errors.read(&mut buffer).await {
        kept.extend_from_slice(&buffer[..count.min(error_room(kept))]);
    }
    pending().await
}

fn error_room(kept: &[u8]) -> usize {
    (MAX_ERROR_BYTES + 1).saturating_sub(kept.len())
}

impl Drop for PluginProcess {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        // It may have ended, and left processes that hold its output.
        kill_process_group(Pid::from_child(&child), Signal::KILL).ok();
        // A process that waits for a disk dies late.
        std::thread::spawn(move || child.wait());
    }
}

// === impl PluginCredential ===

impl PluginCredential {
    /// Parses the output of a plugin: JSON, or YAML as some print it. `None` without a credential.
    fn parse(output: &[u8]) -> Option<Self> {
        let document = serde_json::from_slice(output).ok().or_else(|| {
            let mut problems = Vec::new();
            let node = yaml::parse(std::str::from_utf8(output).ok()?, &mut problems)?;
            free::json(&node, &ConfigPlace::named("plugin"), &mut problems)
        })?;
        let PluginAnswer { mut status } = serde_json::from_value(document).ok()?;
        status.token = status.token.filter(|token| !token.is_empty());
        let has_certificate = status.client_certificate_data.is_some() && status.client_key_data.is_some();
        let is_valid = status.expiration_timestamp.is_none() || status.expires().is_some();
        Some(status).filter(|status| is_valid && (status.token.is_some() || has_certificate))
    }

    fn expires(&self) -> Option<Timestamp> {
        self.expiration_timestamp.as_ref()?.parse().ok()
    }

    /// Puts the credential in the place of the plugin. Returns when it is due.
    fn put_into(self, auth: &mut AuthInfo) -> Option<Instant> {
        let expires = self.expires();
        auth.token = self.token.map(String::into);
        if let (Some(certificate), Some(key)) = (self.client_certificate_data, self.client_key_data) {
            auth.client_certificate_data = Some(STANDARD.encode(certificate));
            auth.client_key_data = Some(STANDARD.encode(key).into());
        }
        let left = Duration::try_from(expires?.duration_since(Timestamp::now())).unwrap_or_default();
        now().checked_add(left.saturating_sub(EXPIRY_MARGIN))
    }
}

#[cfg(test)]
mod tests;

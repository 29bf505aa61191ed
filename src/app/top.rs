//! `vllm-lb top`: the terminal, its keys, and the connection to the balancer. `crate::top` draws.
//!
//! The stream of overviews and the calls that change an upstream have connections and tasks of their own, so
//! that a balancer that does not answer never delays a key.

use std::io::{IsTerminal, Write, stdout};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::Method;
use http_body_util::BodyExt;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyEventKind, KeyModifiers};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio::time::{MissedTickBehavior, interval, sleep};

use super::admin_client::{AdminClient, escaped};
use crate::cli::top::TopArgs;
use crate::sse::{LineSplitter, SseField, SsePiece};
use crate::top::document::TopDocument;
use crate::top::state::{TopCommand, TopState};
use crate::top::view;

/// How long the balancer may be silent beyond the interval of its events.
const MAX_SILENCE: Duration = Duration::from_secs(10);

/// The pause before another attempt to connect.
const RECONNECT_PAUSE: Duration = Duration::from_secs(1);

/// How often the age of what is shown is drawn again.
const CLOCK_INTERVAL: Duration = Duration::from_secs(1);

/// The largest overview.
const MAX_OVERVIEW_BYTES: usize = 64 << 20;

/// The columns of `--once` on a terminal of an unknown size.
const DEFAULT_COLUMNS: u16 = 120;

/// The number of updates, and of keys, that wait to be shown.
const MAX_WAITING: usize = 64;

/// What the tasks report to the screen.
enum TopUpdate {
    Overview(Box<TopDocument>),
    Lost(String),
    /// The result of a command.
    Notice(String),
}

/// Shows the overview until the user quits or a signal ends the program; with `--once`, prints it.
///
/// `columns`: the value of `COLUMNS`, which is the width of `--once` where the output is no terminal.
pub async fn run(args: &TopArgs, token: Option<String>, columns: Option<String>) -> Result<(), String> {
    // A token that cannot be sent is reported before the screen changes.
    client(args, token.as_deref())?;
    if args.once {
        return print(args, token.as_deref(), columns.as_deref()).await;
    }
    if !stdout().is_terminal() {
        return Err("standard output is no terminal: use --once".into());
    }
    // From here on a panic restores the terminal, too.
    let mut terminal = ratatui::try_init().map_err(|error| format!("cannot use the terminal: {error}"))?;
    let shown = show(args, token, &mut terminal).await;
    ratatui::restore();
    shown
}

fn client<'a>(args: &'a TopArgs, token: Option<&str>) -> Result<AdminClient<'a>, String> {
    AdminClient::new(&args.admin, (args.token.as_ref(), token), args.interval + MAX_SILENCE)
}

/// Prints one screen, made of two overviews, since rates need two.
async fn print(args: &TopArgs, token: Option<&str>, columns: Option<&str>) -> Result<(), String> {
    let mut client = client(args, token)?;
    let mut state = TopState::new(args.admin.display());
    for is_last in [false, true] {
        let answer = client.get("/admin/overview").await?;
        let body = client.read(answer, MAX_OVERVIEW_BYTES).await?;
        state.apply(document(&body).map_err(|error| client.failed(error))?);
        if !is_last {
            sleep(args.interval).await;
        }
    }
    let columns = match stdout().is_terminal() {
        true => Some(ratatui::crossterm::terminal::size().map_or(DEFAULT_COLUMNS, |(columns, _)| columns)),
        false => columns.and_then(|columns| columns.parse().ok()).filter(|columns| *columns > 0),
    };
    let text = view::text(&mut state, columns);
    match stdout().write_all(text.as_bytes()).and_then(|()| stdout().flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(format!("cannot write: {error}")),
        _ => Ok(()),
    }
}

fn document(json: &[u8]) -> Result<TopDocument, String> {
    serde_json::from_slice(json).map_err(|error| format!("its overview cannot be read: {error}"))
}

/// Shows overviews on the terminal.
async fn show(args: &TopArgs, token: Option<String>, terminal: &mut DefaultTerminal) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("cannot use the terminal: {error}");
    let mut state = TopState::new(args.admin.display());
    let (sender, mut updates) = mpsc::channel(MAX_WAITING);
    tokio::spawn(follow(args.clone(), token.clone(), sender.clone()));
    let mut events = terminal_events();
    let mut signals = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()]
        .map(|kind| signal(kind).map_err(|error| format!("cannot listen for signals: {error}")));
    let [Ok(terminated), Ok(interrupted), Ok(hung_up)] = &mut signals else {
        return signals.into_iter().find_map(Result::err).map_or(Ok(()), Err);
    };
    let start = Instant::now();
    let mut clock = interval(CLOCK_INTERVAL);
    clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        state.set_time(start.elapsed());
        terminal.draw(|frame| view::draw(frame, &mut state)).map_err(failed)?;
        tokio::select! {
            _ = clock.tick() => {}
            _ = terminated.recv() => return Ok(()),
            _ = interrupted.recv() => return Ok(()),
            _ = hung_up.recv() => return Ok(()),
            Some(update) = updates.recv() => match update {
                TopUpdate::Overview(document) => state.apply(*document),
                TopUpdate::Lost(error) => state.lose(error),
                TopUpdate::Notice(text) => state.notify(text),
            },
            event = events.recv() => match event {
                // The terminal is gone.
                None => return Ok(()),
                Some(Event::Key(key)) if key.kind != KeyEventKind::Release => {
                    let control = key.modifiers.contains(KeyModifiers::CONTROL);
                    match state.press(key.code, control) {
                        Some(TopCommand::Quit) => return Ok(()),
                        Some(TopCommand::Drain { upstream, drain }) => {
                            let (args, token, updates) = (args.clone(), token.clone(), sender.clone());
                            tokio::spawn(change(args, token, (upstream, drain), updates));
                        }
                        None => {}
                    }
                }
                // A new size is drawn; nothing else is of interest.
                Some(_) => {}
            },
        }
    }
}

/// Reads the terminal's events in a thread of their own; the channel closes when there will be no more.
fn terminal_events() -> Receiver<Event> {
    let (sender, receiver) = mpsc::channel(MAX_WAITING);
    std::thread::spawn(move || {
        while let Ok(event) = event::read() {
            if sender.blocking_send(event).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Receives overviews from one connection after another.
async fn follow(args: TopArgs, token: Option<String>, updates: Sender<TopUpdate>) {
    loop {
        let Err(error) = receive(&args, token.as_deref(), &updates).await else { return };
        if updates.send(TopUpdate::Lost(error)).await.is_err() {
            return;
        }
        sleep(RECONNECT_PAUSE).await;
    }
}

/// Receives overviews until the stream fails, or until no task waits for them.
async fn receive(args: &TopArgs, token: Option<&str>, updates: &Sender<TopUpdate>) -> Result<(), String> {
    let mut client = client(args, token)?;
    let seconds = args.interval.as_secs_f64();
    let mut body = client.get(&format!("/admin/live?interval={seconds}")).await?.into_body();
    let mut lines = LineSplitter::new(MAX_OVERVIEW_BYTES);
    while let Some(frame) = client.within_some(body.frame()).await? {
        let Ok(piece) = frame.into_data() else { continue };
        for json in data_lines(&mut lines, &piece) {
            let document = document(&json).map_err(|error| client.failed(error))?;
            if updates.send(TopUpdate::Overview(Box::new(document))).await.is_err() {
                return Ok(());
            }
        }
    }
    Err(client.failed("the stream has ended"))
}

/// The data of the lines that end in a piece of the stream; each overview is one line.
fn data_lines(lines: &mut LineSplitter, piece: &Bytes) -> Vec<Vec<u8>> {
    let mut rest = &piece[..];
    let mut found = Vec::new();
    while let Some(next) = lines.next(&mut rest) {
        if let SsePiece::Line(line) = next
            && let SseField::Data(json) = line.field()
        {
            found.push(json.to_vec());
        }
    }
    found
}

/// Drains an upstream, or ends its drain, and reports the result.
async fn change(
    args: TopArgs,
    token: Option<String>,
    (upstream, drain): (String, bool),
    updates: Sender<TopUpdate>,
) {
    let changed = async {
        let mut client = client(&args, token.as_deref())?;
        let path = format!("/admin/upstreams/{}", escaped(&upstream));
        let body = serde_json::json!({ "drain": drain }).to_string();
        let answer = client.call(Method::PATCH, &path, Some(body)).await?;
        client.read(answer, MAX_OVERVIEW_BYTES).await
    };
    let text = match changed.await {
        Ok(_) if drain => format!("{upstream} is draining"),
        Ok(_) => format!("{upstream} takes requests again"),
        Err(error) => error,
    };
    // Nothing is shown any more when the program ends.
    drop(updates.send(TopUpdate::Notice(text)).await);
}

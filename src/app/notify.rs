//! Notifies systemd of the process's state: serving, reloading, stopping, or replaced by a successor.
//!
//! Each notification is one datagram to the socket of `NOTIFY_SOCKET`; without it nothing is sent. A failure
//! to send is only logged: serving has precedence over supervision.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Reads a variable of the environment.
type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// The notification socket and the watchdog of systemd.
pub(crate) struct Notify {
    target: Option<(UnixDatagram, NotifySocket)>,
    watchdog: Option<Duration>,
}

enum NotifySocket {
    Path(PathBuf),
    /// A name beginning with `@`: an abstract address of Linux rather than a file.
    #[cfg(target_os = "linux")]
    Abstract(std::os::unix::net::SocketAddr),
}

impl Notify {
    /// Reads the environment. `successor`: the process takes over from another, and its watchdog too.
    pub(crate) fn new(env: Env<'_>, successor: bool) -> Self {
        let target = env("NOTIFY_SOCKET").as_deref().and_then(target);
        let target = target.and_then(|target| Some((UnixDatagram::unbound().ok()?, target)));
        let number = |name| env(name)?.parse::<u64>().ok();
        let mine = successor || number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(process::id()));
        let watchdog = number("WATCHDOG_USEC").filter(|limit| *limit > 0 && mine && target.is_some());
        Notify { target, watchdog: watchdog.map(Duration::from_micros) }
    }

    /// Reports that the process serves, also after a reload.
    pub(crate) fn ready(&self) {
        self.send("READY=1");
    }

    /// Reports that the process serves in place of its predecessor.
    pub(crate) fn succeeded(&self) {
        self.send(&format!("MAINPID={}\nREADY=1", process::id()));
    }

    /// Reports that the process reloads its configuration; `ready` ends that.
    pub(crate) fn reloading(&self) {
        let now = clock_gettime(ClockId::Monotonic);
        let micros = i128::from(now.tv_sec) * 1_000_000 + i128::from(now.tv_nsec) / 1_000;
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={micros}"));
    }

    /// Reports that the process stops.
    pub(crate) fn stopping(&self) {
        self.send("STOPPING=1");
    }

    /// Waits until the next watchdog message is due, and sends it. Never returns without a watchdog.
    pub(crate) async fn alive(&self) {
        match self.watchdog {
            Some(limit) => {
                tokio::time::sleep(limit / 3).await;
                self.send("WATCHDOG=1");
            }
            None => std::future::pending().await,
        }
    }

    fn send(&self, words: &str) {
        let Some((socket, target)) = &self.target else { return };
        if let Err(error) = target.send(socket, words.as_bytes()) {
            log::debug!(error:% = error; "cannot notify the supervisor");
        }
    }
}

impl NotifySocket {
    fn send(&self, socket: &UnixDatagram, words: &[u8]) -> io::Result<usize> {
        match self {
            NotifySocket::Path(path) => socket.send_to(words, path),
            #[cfg(target_os = "linux")]
            NotifySocket::Abstract(address) => socket.send_to_addr(words, address),
        }
    }
}

fn target(name: &str) -> Option<NotifySocket> {
    match name.strip_prefix('@') {
        None => name.starts_with('/').then(|| NotifySocket::Path(name.into())),
        #[cfg(target_os = "linux")]
        Some(name) => {
            use std::os::linux::net::SocketAddrExt;
            std::os::unix::net::SocketAddr::from_abstract_name(name).ok().map(NotifySocket::Abstract)
        }
        #[cfg(not(target_os = "linux"))]
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 256];
        let length = socket.recv(&mut buffer).expect("a datagram has come");
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    }

    #[test]
    fn sends_notifications_to_a_path() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).expect("a free path");
        let env = |name: &str| (name == "NOTIFY_SOCKET").then(|| path.display().to_string());
        let notify = Notify::new(&env, false);
        notify.ready();
        assert_eq!(read(&socket), "READY=1");
        notify.reloading();
        let reloading = read(&socket);
        let micros = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").expect(&reloading);
        assert!(micros.parse::<u64>().is_ok(), "{reloading}");
        notify.succeeded();
        assert_eq!(read(&socket), format!("MAINPID={}\nREADY=1", process::id()));
        notify.stopping();
        assert_eq!(read(&socket), "STOPPING=1");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn sends_notifications_to_an_abstract_name() {
        use std::os::linux::net::SocketAddrExt;
        let name = format!("vllm-lb-test-{}", process::id());
        let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).expect("a name");
        let socket = UnixDatagram::bind_addr(&address).expect("a free name");
        let env = |key: &str| (key == "NOTIFY_SOCKET").then(|| format!("@{name}"));
        Notify::new(&env, false).ready();
        assert_eq!(read(&socket), "READY=1");
    }

    #[test]
    fn feeds_the_watchdog_of_this_process_only() {
        let watchdog = |pid: Option<&str>, limit: &str, successor: bool| {
            let env = |name: &str| match name {
                "NOTIFY_SOCKET" => Some("/nonexistent/notify".to_string()),
                "WATCHDOG_USEC" => Some(limit.to_string()),
                "WATCHDOG_PID" => pid.map(str::to_string),
                _ => None,
            };
            Notify::new(&env, successor).watchdog
        };
        let own = process::id().to_string();
        assert_eq!(watchdog(Some(&own), "3000000", false), Some(Duration::from_secs(3)));
        assert_eq!(watchdog(None, "3000000", false), Some(Duration::from_secs(3)));
        assert_eq!(watchdog(Some("1"), "3000000", false), None);
        assert_eq!(watchdog(Some("1"), "3000000", true), Some(Duration::from_secs(3)));
        assert_eq!(watchdog(None, "0", false), None);
        assert_eq!(watchdog(None, "soon", false), None);
    }

    #[test]
    fn sends_nothing_without_a_supervisor() {
        Notify::new(&|_| None, false).ready();
        Notify::new(&|_| Some("relative".into()), false).stopping();
    }
}

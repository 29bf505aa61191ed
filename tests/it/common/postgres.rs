//! A real PostgreSQL server for tests.

use std::path::PathBuf;
use std::process::{Child, Command};

use rustix::process::{Pid, Signal, kill_process};
use sqlx::postgres::PgConnection;
use sqlx::{Connection, Executor};
use tempfile::TempDir;

use super::eventually;
use super::ports::reserved_port;

/// A PostgreSQL server with a new cluster, on a free port.
pub struct PostgresServer {
    child: Option<Child>,
    folder: TempDir,
    port: u16,
}

/// A program of PostgreSQL's, as a user that it runs as: it refuses to be root.
fn postgres_command(program: &str) -> Command {
    let root = rustix::process::geteuid().is_root();
    let mut command = Command::new(if root { "setpriv" } else { "env" });
    if root {
        command.args(["--reuid", "postgres", "--regid", "postgres", "--clear-groups"]);
    }
    command.arg(postgres_program(program)).current_dir("/");
    command
}

/// Debian keeps the programs of each version in a directory of their own.
fn postgres_program(name: &str) -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let of_debian = versions.map(|version| version.path().join("bin").join(name));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path).map(|folder| folder.join(name)).collect::<Vec<_>>();
    let found = in_path.into_iter().chain(of_debian).find(|program| program.exists());
    found.unwrap_or_else(|| panic!("{name} is installed: ./dev setup does it"))
}

impl PostgresServer {
    pub async fn start() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        if rustix::process::geteuid().is_root() {
            let owner = Command::new("chown").arg("postgres").arg(folder.path()).status();
            assert!(owner.expect("chown runs").success());
        }
        let made = postgres_command("initdb")
            .args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync", "-D"])
            .arg(folder.path().join("data"))
            .output()
            .expect("initdb runs");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let mut server = PostgresServer { child: None, folder, port: reserved_port() };
        server.again().await;
        server
    }

    /// Starts it with what it has.
    pub async fn again(&mut self) {
        let log = std::fs::File::options().append(true).create(true).open(self.folder.path().join("log"));
        let child = postgres_command("postgres")
            .args(["-p", &self.port.to_string(), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"])
            .arg("-k")
            .arg(self.folder.path())
            .arg("-D")
            .arg(self.folder.path().join("data"))
            .stderr(log.expect("the folder can be written"))
            .spawn();
        self.child = Some(child.expect("postgres runs"));
        eventually("PostgreSQL answers", async || PgConnection::connect(&self.url("postgres")).await.ok())
            .await;
    }

    /// Ends it at once, as a crash does.
    pub fn crash(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        signal(child.id(), Signal::QUIT);
        child.wait().expect("its own child can be waited for");
    }

    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    pub async fn connect(&self, database: &str) -> PgConnection {
        PgConnection::connect(&self.url(database)).await.expect("connects")
    }

    pub async fn create(&self, database: &str) {
        let create = format!("CREATE DATABASE {database}");
        self.connect("postgres").await.execute(&*create).await.expect("a database");
    }
}

impl Drop for PostgresServer {
    fn drop(&mut self) {
        self.crash();
    }
}

pub fn signal(process: u32, signal: Signal) {
    let pid = i32::try_from(process).ok().and_then(Pid::from_raw).expect("a process has an id");
    kill_process(pid, signal).expect("the process is there until it was waited for");
}

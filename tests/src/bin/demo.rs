//! A newcomer's first look: a virtual smartcard in a virtual machine, step by step, with what is run and what it
//! says.

#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::future::Future;
use std::io::IsTerminal;
use std::path::Path;
use std::pin::pin;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use stack_tests::database::{Database, NAMES, PIN};
use stack_tests::guest::{Boot, Guest, Image, within};
use stack_tests::passthru::{Link, Road};
use stack_tests::process::{Process, program};
use stack_tests::reader::{Bus, Place, certificates};
use tokio::process::Command;

const USAGE: &str = "\
usage: demo [--passthru] [--full]

Boots a small Debian guest in QEMU, plugs in a USB card reader with a smartcard made of three NSS certificates, and
lets OpenSC in the guest sign with each of them. The signatures are verified outside the guest.
Takes some 15 seconds; the first time also a while for the guest's image. Nothing is left behind but that image.

  --passthru  QEMU's own card reader and vscclient, instead of ccid-device's reader over usbredir
  --full      print all that the programs say and QEMU's whole command line
  --help      this
";

/// What OpenSC calls the three keys.
const IDS: [&str; 3] = ["0001", "0002", "0003"];

/// Silence longer than this looks like a hang.
const PATIENCE: Duration = Duration::from_secs(5);

/// A slow line may bring the packages of the guest's image.
const IMAGE_LIMIT: Duration = Duration::from_secs(900);

/// For the programs of this machine, which take a second or two.
const HOST_LIMIT: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let (mut full, mut passthru) = (false, false);
    for word in words {
        match word {
            "--full" => full = true,
            "--passthru" => passthru = true,
            "--help" | "-h" => {
                print!("{USAGE}");
                return ExitCode::SUCCESS;
            }
            _ => {
                eprint!("demo: {word}?\n{USAGE}");
                return ExitCode::from(2);
            }
        }
    }
    match run(full, passthru) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\ndemo: FAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(full: bool, passthru: bool) -> Result<()> {
    // One directory for all that is temporary: databases that are kept for copying live as long as the process.
    let scratch = tempfile::Builder::new().prefix("card-demo-").tempdir()?;
    if tempfile::env::override_temp_dir(scratch.path()).is_err() {
        bail!("a temporary directory is in use already");
    }
    let mut tour = Tour::new(full, scratch.path())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let done = runtime.block_on(async {
        tokio::select! {
            done = shown(&mut tour, passthru) => done,
            interrupted = tokio::signal::ctrl_c() => {
                interrupted?;
                bail!("interrupted")
            }
        }
    });
    // An image that is just being built would be waited for.
    runtime.shutdown_background();
    let removed = scratch.close().context("removing the temporary directory");
    done.with_context(|| format!("step {}", tour.number))?;
    removed?;
    tour.all_is_well();
    Ok(())
}

/// How the card comes into the guest: what is started, and what is said about it.
struct Way {
    qemu: Vec<String>,
    about_qemu: &'static str,
    program: &'static str,
    args: Vec<String>,
    about_program: &'static str,
    /// What it says when the guest has what it brings.
    done: &'static str,
    recipe: String,
    /// Where the sockets are.
    _sockets: Box<dyn std::any::Any>,
}

impl Way {
    fn passthru(database: &Database) -> Result<Self> {
        let link = Link::new(Road::Unix)?;
        let mut args: Vec<String> = ["--profile", "cac", "--db", &database.spec()].map(str::to_owned).into();
        args.extend(NAMES.iter().flat_map(|name| ["--cert".to_owned(), (*name).to_owned()]));
        args.push(link.endpoint());
        Ok(Self {
            qemu: link.qemu(),
            about_qemu: "A USB card reader (usb-ccid) and in it a card that somebody brings over a socket \
                         (ccid-card-passthru).",
            program: "vscclient",
            args,
            about_program: "It makes a card of the three certificates and brings it over the socket; the keys stay \
                            on this side.",
            done: "card inserted",
            recipe: format!(
                "Certificates of an NSS database you have, and a machine on a PC with a UHCI controller (-usb):

  qemu-system-x86_64 -m 2G -drive file=disk.qcow2 -usb \\
    -chardev socket,id=card,path=$XDG_RUNTIME_DIR/card,server=on,wait=off \\
    -device usb-ccid,bus=usb-bus.0 -device ccid-card-passthru,chardev=card

  {} --db sql:$HOME/certs --cert NICKNAME --cert ANOTHER unix:$XDG_RUNTIME_DIR/card",
                here(&program("vscclient")?)
            ),
            _sockets: Box::new(link),
        })
    }

    fn usbredir(database: &Database) -> Result<Self> {
        let place = Place::new(Bus::Xhci)?;
        Ok(Self {
            qemu: place.qemu(),
            about_qemu: "An xHCI controller, and on it a USB device that somebody brings over a socket (usb-redir).",
            program: "ccid-device",
            args: ["--reader", &place.reader(""), "--card", &certificates(database, "")]
                .map(str::to_owned)
                .into(),
            about_program: "It makes a USB card reader and in it a card of the three certificates; the keys stay on \
                            this side.",
            done: "reader 0: a guest has it",
            recipe: format!(
                "Certificates of an NSS database you have, and a machine with an xHCI controller:

  qemu-system-x86_64 -m 2G -drive file=disk.qcow2 -device qemu-xhci \\
    -chardev socket,id=reader,path=$XDG_RUNTIME_DIR/reader,server=on,wait=off \\
    -device usb-redir,chardev=reader

  {} --reader usbredir,unix:$XDG_RUNTIME_DIR/reader \\
    --card cert,db=sql:$HOME/certs,cert=NICKNAME,cert=ANOTHER",
                here(&program("ccid-device")?)
            ),
            _sockets: Box::new(place),
        })
    }
}

async fn shown(tour: &mut Tour, passthru: bool) -> Result<()> {
    println!("A virtual smartcard in a virtual machine. $ is this machine, guest# the one inside QEMU.");
    println!("D={} is a directory for the time of this demo.", tour.scratch);

    tour.step(
        "Three certificates",
        "NSS's certutil makes a CA, three certificates and their RSA keys in a database. Its password is to be the \
         card's PIN.",
    );
    let making = tokio::task::spawn_blocking(Database::with_password);
    let database =
        tour.wait("keys are generated", within(None, HOST_LIMIT, "the database", making)).await???;
    tour.host(&["certutil", "-L", "-d", &database.spec()], &["cert", "ca "]).await?;

    tour.step(
        "The guest",
        "A kernel, pcscd and OpenSC, put together from Debian's packages the first time and kept in cargo's target \
         directory.",
    );
    let image = tokio::task::spawn_blocking(Image::ensure);
    let image = tour
        .wait("downloading and building", within(None, IMAGE_LIMIT, "the guest's image", image))
        .await???;
    tour.output(&format!("kernel     {}", image.kernel.display()), &[]);
    tour.output(&format!("initramfs  {}", image.initramfs.display()), &[]);

    let way = if passthru { Way::passthru(&database)? } else { Way::usbredir(&database)? };
    tour.step("QEMU", way.about_qemu);
    let reader = way.qemu;
    if !tour.full {
        tour.command(
            "$",
            &format!("qemu-system-x86_64 -accel tcg -m 256 -kernel … -initrd … \\\n{}", lines(&reader)),
        );
    }
    let guest = tour.wait("booting", Guest::boot(Boot::with(reader))).await?;
    if tour.full {
        // What runs is what has been asked for, but that a person can read it.
        let line = std::fs::read_to_string(format!("/proc/{}/cmdline", guest.pid()))?;
        let words: Vec<String> = line.split_terminator('\0').map(str::to_owned).collect();
        tour.command("$", &format!("{} \\\n{}", words[0], lines(&words[1..])));
    }

    tour.step(way.program, way.about_program);
    let state = Path::new(&tour.scratch).join("state");
    let args = way.args;
    let typed = format!("{} \\\n{}", here(&program(way.program)?), lines(&args));
    tour.command("$", &format!("XDG_STATE_HOME={} {typed} &", state.display()));
    let mut client = Process::start(way.program, args, &[("XDG_STATE_HOME", OsStr::new(&state))])?;
    let inserted = tour.wait("the guest takes it", client.line(way.done)).await;
    // Without what its log puts before each line.
    let said = client.log();
    let said: Vec<_> =
        said.lines().map(|line| line.split_once("INFO ").map_or(line, |(_, what)| what)).collect();
    tour.output(&said.join("\n"), &[]);
    inserted?;

    let used = use_the_card(tour, &guest, &database).await;
    used.map_err(|error| anyhow!("{error:#}\n--- {}:\n{}", way.program, client.log()))?;
    client.terminate().await?;
    guest.shutdown().await;

    tour.title("For a machine of your own");
    println!("{}\n\nIn the guest: pcscd, libccid and OpenSC; then `pkcs11-tool -L`.", way.recipe);
    Ok(())
}

/// What a user in the guest does with the card.
async fn use_the_card(tour: &mut Tour, guest: &Guest, database: &Database) -> Result<()> {
    tour.step(
        "The card is in the guest",
        "pcscd in the guest finds the reader, and OpenSC takes the card for a CAC. (guest-pcsc is this guest's own \
         tool for waiting.)",
    );
    guest.start_pcscd().await?;
    tour.guest(guest, "guest-pcsc wait-reader 30", &["0:"]).await?;
    tour.guest(guest, "guest-pcsc wait-card present 30", &[]).await?;
    let slots = tour
        .guest(guest, "pkcs11-tool -L", &["Slot", "token label", "manufacturer", "flags", "serial"])
        .await?;
    ensure!(slots.contains("login required"), "OpenSC finds no token:\n{slots}");

    tour.step("What is on it", "Login with the PIN: three certificates, and the private keys to them.");
    let objects = tour
        .guest(guest, &format!("pkcs11-tool -O --login --pin {PIN}"), &["Object;", "ID:", "subject"])
        .await?;
    for kind in ["Certificate Object", "Private Key Object"] {
        let count = objects.matches(kind).count();
        ensure!(count == NAMES.len(), "{count} of {kind} instead of {}:\n{objects}", NAMES.len());
    }

    for (id, name) in IDS.into_iter().zip(NAMES) {
        tour.step(
            &format!("A signature with key {id}"),
            &format!("Made in the guest, verified out here with the public key of {name}."),
        );
        let (message, signature) = (format!("/tmp/message-{id}"), format!("/tmp/signature-{id}"));
        let text = format!("Signed with {name}.");
        tour.guest(guest, &format!("echo -n '{text}' >{message}"), &[]).await?;
        let sign = format!(
            "pkcs11-tool --sign --mechanism SHA256-RSA-PKCS --login --pin {PIN} --id {id} -i {message} -o {signature}"
        );
        tour.guest(guest, &sign, &["algorithm"]).await?;
        let signature = guest.get(&signature).await?;
        tour.output(&format!("({} bytes are copied out of the guest)", signature.len()), &[]);
        let at = |file: &str| database.path().join(file).display().to_string();
        tour.command(
            "$",
            &format!(
                "openssl dgst -sha256 -verify {} -signature {} {}",
                at(&format!("{name}.pub")),
                at("signature"),
                at("message")
            ),
        );
        ensure!(database.verifies(name, text.as_bytes(), &signature)?, "the signature is wrong");
        tour.output("Verified OK", &[]);
        ensure!(!database.verifies(name, b"Another message.", &signature)?, "openssl verifies anything");
    }
    Ok(())
}

/// What is shown, and how.
struct Tour {
    full: bool,
    colours: bool,
    scratch: String,
    number: u32,
    start: Instant,
}

impl Tour {
    fn new(full: bool, scratch: &Path) -> Result<Self> {
        let scratch =
            scratch.to_str().ok_or_else(|| anyhow!("the temporary directory's name is not UTF-8"))?;
        // https://no-color.org
        let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let colours = std::io::stdout().is_terminal() && !plain;
        Ok(Self { full, colours, scratch: scratch.to_owned(), number: 0, start: Instant::now() })
    }

    fn painted(&self, code: &str, text: &str) -> String {
        if self.colours { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn title(&self, title: &str) {
        println!("\n{}", self.painted("1", title));
    }

    fn step(&mut self, title: &str, why: &str) {
        self.number += 1;
        self.title(&format!("{}. {title}", self.number));
        println!("{why}");
    }

    /// A command as one would type it.
    fn command(&self, prompt: &str, command: &str) {
        println!("  {} {}", self.painted("32", prompt), self.painted("36", &self.short(command)));
    }

    /// What a program said: the lines with one of `keep` in them; all of them if there is none.
    fn output(&self, text: &str, keep: &[&str]) {
        let text = self.short(text);
        let wanted = |line: &&str| {
            let kept = self.full || keep.is_empty() || keep.iter().any(|part| line.contains(part));
            kept && !line.trim().is_empty()
        };
        for line in text.lines().filter(wanted) {
            println!("  {}", line.trim_end());
        }
    }

    fn took(&self, start: Instant) {
        println!("  {}", self.painted("2", &format!("({:.1} s)", start.elapsed().as_secs_f64())));
    }

    /// Waits, and says so when it takes long.
    async fn wait<T>(&self, what: &str, future: impl Future<Output = T>) -> T {
        let start = Instant::now();
        let mut future = pin!(future);
        let mut impatience = tokio::time::interval_at((start + PATIENCE).into(), PATIENCE);
        loop {
            tokio::select! {
                done = &mut future => {
                    self.took(start);
                    return done;
                }
                _ = impatience.tick() => println!("  … {what}: {} s so far", start.elapsed().as_secs()),
            }
        }
    }

    /// Runs a program of this machine.
    async fn host(&self, words: &[&str], keep: &[&str]) -> Result<()> {
        self.command("$", &words.join(" "));
        let running = Command::new(words[0]).args(&words[1..]).kill_on_drop(true).output();
        let ran = within(None, HOST_LIMIT, words[0], running).await?.with_context(|| words[0].to_owned())?;
        let said = String::from_utf8_lossy(&ran.stdout);
        ensure!(
            ran.status.success(),
            "{}: {}\n{said}{}",
            words[0],
            ran.status,
            String::from_utf8_lossy(&ran.stderr)
        );
        self.output(&said, keep);
        Ok(())
    }

    /// Runs a command in the guest.
    async fn guest(&self, guest: &Guest, command: &str, keep: &[&str]) -> Result<String> {
        self.command("guest#", command);
        let start = Instant::now();
        let said = guest.ok(command).await?;
        self.output(&said, keep);
        self.took(start);
        Ok(said)
    }

    /// `$D` for the temporary directory, which is told at the start.
    fn short(&self, text: &str) -> String {
        text.replace(&self.scratch, "$D")
    }

    fn all_is_well(&self) {
        let what = "All is well: the guest signed with all three keys of the card, and openssl verified it";
        let seconds = self.start.elapsed().as_secs_f64();
        println!("\n{}", self.painted("1;32", &format!("{what}. {seconds:.1} s in all.")));
    }
}

/// A program's path, from where the user is.
fn here(path: &Path) -> String {
    let here = std::env::current_dir().unwrap_or_default();
    path.strip_prefix(here).unwrap_or(path).display().to_string()
}

/// Arguments as one would type them, an option and its value on each line.
fn lines(args: &[String]) -> String {
    let mut lines: Vec<String> = Vec::new();
    let mut after_option = false;
    for arg in args {
        let quoted = if arg.contains(' ') { format!("'{arg}'") } else { arg.clone() };
        let option = arg.starts_with('-');
        match lines.last_mut() {
            Some(line) if after_option && !option => {
                line.push(' ');
                line.push_str(&quoted);
            }
            _ => lines.push(format!("      {quoted}")),
        }
        after_option = option;
    }
    lines.join(" \\\n")
}

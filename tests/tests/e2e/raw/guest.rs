//! Our PIV card in the host's pcscd, passed on raw into a guest; host and guest use it both.

use std::cell::Cell;
use std::fs::{Permissions, read, set_permissions, write};
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result, ensure};
use stack_tests::guest::{Boot, Guest};
use stack_tests::hex;
use stack_tests::host::verify;
use stack_tests::passthru::{Link, Road};
use stack_tests::pcscd::Pcscd;
use stack_tests::process::Process;
use stack_tests::reader::{Bus, Place};

const PIN: &str = "314159";
/// Command and what is to be signed, in the guest and on the host.
const SIGN: &str = "--sign --mechanism SHA256-RSA-PKCS --login --id 01 --input-file message --output-file";
/// An empty VERIFY: how many tries are left (SP 800-73-4 part 2 §3.2.1).
const QUESTION: &str = "00200080";

/// How the card comes into the guest.
enum Way {
    /// vscclient and QEMU's ccid-card-passthru, which speaks T=0.
    Passthru(Link),
    /// ccid-device and QEMU's usb-redir.
    Reader(Place),
}

impl Way {
    fn passthru() -> Result<Self> {
        Ok(Self::Passthru(Link::new(Road::Unix)?))
    }

    fn reader() -> Result<Self> {
        Ok(Self::Reader(Place::new(Bus::Xhci)?))
    }

    fn qemu(&self) -> Vec<String> {
        match self {
            Self::Passthru(link) => link.qemu(),
            Self::Reader(place) => place.qemu(),
        }
    }

    /// What passes the card on, beside its pcscd; with options such as `keep-tries=0`.
    fn start(&self, pcscd: &Pcscd, options: &[&str]) -> Result<Process> {
        match self {
            Self::Passthru(link) => {
                let options = options.iter().map(|option| format!("--{option}"));
                let args = ["--pcsc", "Virtual PCD*"].map(str::to_owned).into_iter().chain(options);
                pcscd.start_program("vscclient", args.chain([link.endpoint()]))
            }
            Self::Reader(place) => {
                let options: String = options.iter().map(|option| format!(",{option}")).collect();
                let card = format!("pcsc,name=Virtual PCD*{options}");
                pcscd.start_program("ccid-device", ["--reader", &place.reader(""), "--card", &card])
            }
        }
    }
}

/// The host's pcscd with the card in it, and a guest that has it.
struct Bench {
    pcscd: Pcscd,
    card: Process,
    passed: Process,
    guest: Guest,
}

/// A new PIV card in the directory `jane`, and its public key.
async fn new_card(pcscd: &Pcscd) -> Result<()> {
    write(pcscd.path("pin"), PIN)?;
    set_permissions(pcscd.path("pin"), Permissions::from_mode(0o600))?;
    let vscclient = stack_tests::process::program("vscclient")?.display().to_string();
    pcscd.ok(&format!("{vscclient} new-card jane --name Jane --pin-file pin")).await?;
    pcscd.ok("openssl x509 -in jane/authentication.pem -noout -pubkey -out key").await.map(drop)
}

impl Bench {
    async fn start(way: &Way, options: &[&str]) -> Result<Self> {
        let pcscd = Pcscd::start().await?;
        new_card(&pcscd).await?;
        let card = pcscd.start_program("vscclient", ["card", "jane", "vpcd:"])?;
        pcscd.card_in(0).await.with_context(|| card.log())?;
        let (guest, passed) = match way {
            // It listens, and QEMU connects.
            Way::Reader(_) => {
                let passed = way.start(&pcscd, options)?;
                passed.line("ready").await?;
                (Guest::boot(Boot::with(way.qemu())).await?, passed)
            }
            Way::Passthru(_) => (Guest::boot(Boot::with(way.qemu())).await?, way.start(&pcscd, options)?),
        };
        guest.start_pcscd().await?;
        guest.ok("guest-pcsc wait-reader 30").await?;
        let bench = Self { pcscd, card, passed, guest };
        bench.comes().await?;
        Ok(bench)
    }

    /// The guest sees the card come.
    async fn comes(&self) -> Result<()> {
        let said = self.guest.ok("guest-pcsc wait-card present 30").await;
        said.map(drop).with_context(|| self.passed.log())
    }

    /// The guest sees the card go.
    async fn goes(&self) -> Result<()> {
        let said = self.guest.ok("guest-pcsc wait-card absent 30").await;
        said.map(drop).with_context(|| self.passed.log())
    }

    async fn verified(&self, message: &[u8], signature: &[u8]) -> Result<()> {
        write(self.pcscd.path("message"), message)?;
        write(self.pcscd.path("signature"), signature)?;
        self.pcscd.ok("openssl dgst -sha256 -verify key -signature signature message").await.map(drop)
    }

    /// OpenSC in the guest knows the card, logs in and signs.
    async fn used_in_the_guest(&self) -> Result<()> {
        let name = self.guest.ok("opensc-tool -n").await?;
        ensure!(name.contains("Personal Identity Verification Card"), "{name}");
        let message = b"signed in the guest";
        self.guest.put("/tmp/message", message).await?;
        self.guest.ok(&format!("cd /tmp && pkcs11-tool {SIGN} signature --pin {PIN}")).await?;
        self.verified(message, &self.guest.get("/tmp/signature").await?).await
    }

    /// A program of the host resets the card. For the guest it is another insertion.
    async fn reset_by_the_host(&self) -> Result<()> {
        let status = self.guest.ok("guest-pcsc wait-card present 30").await?;
        let events = status.split_once("events=").and_then(|(_, rest)| rest.split(' ').next());
        let events = events.with_context(|| status.clone())?;
        self.pcscd.ok("guest-pcsc reset").await?;
        // Only who uses the card learns of it.
        let told = self.guest.run(&format!("guest-pcsc transmit {QUESTION}")).await?;
        let changed = self.guest.ok(&format!("guest-pcsc wait-card changed 30 0 {events}")).await;
        changed.with_context(|| format!("{}{}", told.text(), self.passed.log()))?;
        self.comes().await?;
        self.used_in_the_guest().await
    }

    /// A program of the host and one of the guest, both at once, until both have signed `count` times.
    async fn used_by_both(&self, count: u32) -> Result<()> {
        let message = b"signed by the guest and by the host";
        self.guest.put("/tmp/message", message).await?;
        write(self.pcscd.path("message"), message)?;
        // The guest's session begins with a reset. Who has logged in just before, and only then, does so again.
        let script = |tool: &str| {
            let sign = format!("{tool} {SIGN} signature-$round --pin {PIN} 2>&1");
            format!(
                "again=no
                 for round in $(seq {count}); do
                     said=$({sign}) && continue
                     case $again,$said in
                         no,*CKR_USER_NOT_LOGGED_IN*) again=yes ;;
                         *) echo \"$said\"; exit 1 ;;
                     esac
                     {sign} || exit 1
                 done"
            )
        };
        let mut host = self.pcscd.command("sh");
        host.arg("-c").arg(script(&format!("pkcs11-tool --module {}", module()?)));
        let in_guest = format!("cd /tmp && {}", script("pkcs11-tool"));
        let (host, guest) = tokio::join!(self.pcscd.run(host), self.guest.run(&in_guest));
        let (host, guest) = (host?, guest?);
        ensure!(host.status.success(), "on the host: {}", host.text);
        ensure!(guest.status == 0, "in the guest: {}", guest.text());
        for round in 1..=count {
            let name = format!("signature-{round}");
            self.verified(message, &read(self.pcscd.path(&name))?).await?;
            self.verified(message, &self.guest.get(&format!("/tmp/{name}")).await?).await?;
        }
        Ok(())
    }
}

/// What the guest has selected stays selected while it is at work, however often a program of the host selects another
/// application in between.
async fn what_is_selected_stays(bench: &Bench) -> Result<()> {
    // Far fewer than fill the four seconds after which it is a program of the host's turn.
    const PAIRS: usize = 50;
    // SELECT of the first PKI container, and GET PROPERTIES, which PIV does not know.
    let (container, properties) = (stack_tests::SELECT, "8056010000");
    // That asks the card, which it gets when the guest's last transaction is over: the one below is a new one.
    let other = "opensc-tool -n";
    bench.pcscd.ok(other).await?;
    let pairs = format!("guest-pcsc transmit{}", format!(" {container} {properties}").repeat(PAIRS));
    let done = Cell::new(false);
    let guest = async {
        let said = bench.guest.ok(&pairs).await;
        done.set(true);
        said.with_context(|| bench.passed.log())
    };
    let host = async {
        while !done.get() {
            // The guest's session may begin with a reset, which this may meet.
            bench.pcscd.words(other).await?;
        }
        anyhow::Ok(())
    };
    let (said, ended) = tokio::join!(guest, host);
    ended?;
    let said = said?;
    let answers = statuses(&said);
    let found = |status: &&str| status.starts_with("61") || status.ends_with("9000");
    ensure!(answers.len() == 2 * PAIRS && answers.iter().all(found), "{said}");
    ensure!(answers.chunks(2).all(|pair| *pair == answers[..2]), "{said}");
    Ok(())
}

/// OpenSC as a PKCS#11 module.
fn module() -> Result<String> {
    super::super::host::module()
}

async fn a_piv_card_in_the_guest(way: Way) -> Result<()> {
    let mut bench = Bench::start(&way, &[]).await?;
    bench.used_in_the_guest().await?;

    // Taken out of the host's reader and put in again.
    ensure!(bench.card.terminate().await?.success(), "{}", bench.card.log());
    bench.goes().await?;
    bench.card = bench.pcscd.start_program("vscclient", ["card", "jane", "vpcd:"])?;
    bench.comes().await?;
    bench.used_in_the_guest().await?;

    // The card comes back to a restarted pcscd by itself, and so does what passes it on.
    bench.pcscd.stop_daemon().await?;
    bench.goes().await?;
    bench.pcscd.start_daemon().await?;
    bench.comes().await?;
    bench.used_in_the_guest().await?;

    bench.used_by_both(8).await?;
    what_is_selected_stays(&bench).await?;
    if let Way::Passthru(_) = way {
        // Over usbredir the guest powers a card down that nobody uses: there is nothing to lose.
        bench.reset_by_the_host().await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_piv_card_in_the_guest_over_passthru() -> Result<()> {
    a_piv_card_in_the_guest(Way::passthru()?).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_piv_card_in_the_guest_over_usbredir() -> Result<()> {
    a_piv_card_in_the_guest(Way::reader()?).await
}

/// The status words of answers that guest-pcsc printed.
fn statuses(said: &str) -> Vec<&str> {
    said.lines().filter_map(|line| line.split(' ').next()).collect()
}

/// A guest that tries PINs.
async fn a_loop_of_wrong_pins(bench: &Bench, count: usize) -> Result<String> {
    let mut wrong = verify("000000");
    wrong[3] = 0x80;
    let wrong = format!(" {}", hex(&wrong)).repeat(count);
    bench.guest.ok(&format!("guest-pcsc transmit{wrong}")).await
}

async fn the_last_try_is_kept(way: Way) -> Result<()> {
    let bench = Bench::start(&way, &[]).await?;
    let said = a_loop_of_wrong_pins(&bench, 5).await?;
    ensure!(statuses(&said) == ["63C2", "63C1", "6983", "6983", "6983"], "{said}");
    let said = bench.guest.run(&format!("pkcs11-tool -O --login --pin {PIN}")).await?;
    ensure!(said.text().contains("CKR_PIN_LOCKED"), "{}", said.text());
    // The host has that try, and all are there again.
    let tool = format!("pkcs11-tool --module {}", module()?);
    let said = bench.pcscd.ok(&format!("{tool} -L")).await?;
    ensure!(said.contains("final user PIN try"), "{said}");
    bench.pcscd.ok(&format!("{tool} -O --login --pin {PIN}")).await?;
    bench.used_in_the_guest().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_try_is_kept_over_passthru() -> Result<()> {
    the_last_try_is_kept(Way::passthru()?).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_try_is_kept_over_usbredir() -> Result<()> {
    the_last_try_is_kept(Way::reader()?).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_may_spends_all_tries() -> Result<()> {
    let bench = Bench::start(&Way::reader()?, &["keep-tries=0"]).await?;
    let said = a_loop_of_wrong_pins(&bench, 4).await?;
    ensure!(statuses(&said) == ["63C2", "63C1", "63C0", "6983"], "{said}");
    let said = bench.pcscd.ok(&format!("guest-pcsc transmit {QUESTION}")).await?;
    ensure!(matches!(statuses(&said)[..], ["63C0" | "6983"]), "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_card_taken_alone_is_the_guests() -> Result<()> {
    let mut bench = Bench::start(&Way::passthru()?, &["exclusive"]).await?;
    bench.used_in_the_guest().await?;
    let question = format!("guest-pcsc transmit {QUESTION}");
    let ran = bench.pcscd.words(&question).await?;
    ensure!(ran.text.contains("SharingViolation"), "{}", ran.text);
    ensure!(bench.passed.terminate().await?.success(), "{}", bench.passed.log());
    bench.goes().await?;
    // What the guest verified is not verified any more.
    let said = bench.pcscd.ok(&question).await?;
    ensure!(statuses(&said) == ["63C3"], "{said}");
    Ok(())
}

/// There is nothing yet to be passed on: no pcscd, no reader, no card. It is awaited, and missed once in the log.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_yet_is_awaited() -> Result<()> {
    let (pcscd, way) = (Pcscd::not_started().await?, Way::passthru()?);
    let mut passed = way.start(&pcscd, &[])?;
    passed.line("the PC/SC service (pcscd) cannot be used").await?;
    let mut other = pcscd.start_program("vscclient", ["--pcsc", "Gemalto", "unix-listen:other"])?;
    other.line("the PC/SC service (pcscd) cannot be used").await?;
    pcscd.start_daemon().await?;
    passed.line("reader Virtual PCD 00 00").await?;
    other.line("no reader is called \"Gemalto\"; there are: Virtual PCD 00 00, Virtual PCD 00 01").await?;
    for program in [&mut passed, &mut other] {
        ensure!(program.terminate().await?.success(), "{}", program.log());
        let log = program.log();
        ensure!(log.matches("cannot be used").count() == 1, "{log}");
    }
    Ok(())
}

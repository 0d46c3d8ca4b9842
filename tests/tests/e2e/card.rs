//! What OpenSC in the guest makes of the card, over every kind of connection.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use stack_tests::database::{Database, NAMES, PIN};
use stack_tests::guest::{Guest, within};
use stack_tests::passthru::{Road, Stack};
use stack_tests::{acknowledged_at_once, selects};

/// What OpenSC calls the three keys.
const IDS: [&str; 3] = ["0001", "0002", "0003"];

/// Everything a user of the card does in the guest, with the results checked outside of it.
pub(crate) async fn use_the_card(guest: &Guest, database: &Database, pin: &str) -> Result<()> {
    let name = guest.ok("opensc-tool -n").await?;
    ensure!(name.contains("Common Access Card (CAC)"), "{name}");

    let objects = guest.ok(&format!("pkcs11-tool -L -O --login --pin {pin}")).await?;
    for kind in ["Certificate Object", "Private Key Object"] {
        let count = objects.matches(kind).count();
        ensure!(count == 3, "{count} of {kind}:\n{objects}");
    }
    ensure!(objects.contains("login required"), "{objects}");

    for (id, name) in IDS.into_iter().zip(NAMES) {
        let message = format!("signed with {name}");
        guest.put("/tmp/message", message.as_bytes()).await?;
        guest
            .ok(&format!(
                "pkcs11-tool --sign --mechanism SHA256-RSA-PKCS --login --pin {pin} --id {id} \
                 -i /tmp/message -o /tmp/signature"
            ))
            .await?;
        let signature = guest.get("/tmp/signature").await?;
        ensure!(database.verifies(name, message.as_bytes(), &signature)?, "signature of {name}");
        ensure!(!database.verifies(name, b"another message", &signature)?, "any message verifies");
    }

    let secret = b"only the card can read this";
    guest.put("/tmp/encrypted", &database.encrypt("encryption-cert", secret)?).await?;
    guest
        .ok(&format!(
            "pkcs11-tool --decrypt --mechanism RSA-PKCS --login --pin {pin} --id 0003 \
             -i /tmp/encrypted -o /tmp/decrypted"
        ))
        .await?;
    ensure!(guest.get("/tmp/decrypted").await? == secret, "decrypted");

    let test = guest.ok(&format!("pkcs11-tool --test --login --pin {pin}")).await?;
    ensure!(test.trim_end().ends_with("No errors"), "{test}");

    // It exits with 0 whatever happened, so its text is what counts.
    let dump = guest.ok("pkcs15-tool -D").await?;
    let lower = dump.to_lowercase();
    ensure!(!lower.contains("error") && !lower.contains("failed"), "{dump}");
    ensure!(dump.matches("X.509 Certificate").count() == 3, "{dump}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn over_a_unix_socket() -> Result<()> {
    let stack = Stack::start(Road::Unix, &[]).await?;
    use_the_card(&stack.guest, &stack.database, PIN).await
}

#[tokio::test(flavor = "multi_thread")]
async fn over_tcp_with_qemu_listening() -> Result<()> {
    stack_tests::alone();
    let stack = Stack::start(Road::Tcp, &[]).await?;
    use_the_card(&stack.guest, &stack.database, PIN).await?;
    // QEMU writes header and payload apart.
    acknowledged_at_once(&stack.guest.ok(&selects()).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn over_tcp_with_qemu_waiting_for_us() -> Result<()> {
    let stack = Stack::start(Road::TcpWait, &[]).await?;
    use_the_card(&stack.guest, &stack.database, PIN).await
}

#[tokio::test(flavor = "multi_thread")]
async fn with_qemu_connecting_once() -> Result<()> {
    let stack = Stack::start(Road::QemuConnects, &[]).await?;
    use_the_card(&stack.guest, &stack.database, PIN).await
}

#[tokio::test(flavor = "multi_thread")]
async fn with_qemu_reconnecting() -> Result<()> {
    let stack = Stack::start(Road::QemuReconnects, &[]).await?;
    use_the_card(&stack.guest, &stack.database, PIN).await
}

/// The command line that old documentation shows.
#[tokio::test(flavor = "multi_thread")]
async fn as_the_old_vscclient() -> Result<()> {
    let mut stack = Stack::start(Road::Tcp, &[]).await?;
    let gone = stack.guest.ok("guest-pcsc wait-card absent 20");
    let (gone, ended) = tokio::join!(gone, stack.client.terminate());
    gone?;
    ensure!(ended?.success());
    let options =
        format!("db=\"{}\" use_hw=no soft=(,Virtual Reader,CAC,,{})", stack.database.spec(), NAMES.join(","));
    let endpoint = stack.link.endpoint();
    let (host, port) = endpoint.trim_start_matches("tcp:").split_once(':').expect("host and port");
    let state = stack.state.path().as_os_str();
    stack.client = stack_tests::process::Process::start(
        "vscclient",
        ["-d", "1", "-e", &options, host, port],
        &[("XDG_STATE_HOME", state)],
    )?;
    stack.guest.ok("guest-pcsc wait-card present 20").await?;
    let objects = stack.guest.ok(&format!("pkcs11-tool -O --login --pin {PIN}")).await?;
    ensure!(objects.matches("Private Key Object").count() == 3, "{objects}");
    Ok(())
}

/// Standard input that is closed or no terminal means no console and no spinning; the card stays.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_client_uses_no_processor() -> Result<()> {
    let stack = Stack::start(Road::Unix, &[]).await?;
    let before = stack.client.cpu_ticks()?;
    // The guest's clock is the event: pcscd polls the card's presence meanwhile.
    stack.guest.ok("sleep 5").await?;
    let used = stack.client.cpu_ticks()? - before;
    ensure!(used <= 5, "{used} ticks of processor time in 5 idle seconds");
    ensure!(!stack.client.log().contains("> "), "{}", stack.client.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_pins_lock_the_card_and_unlock_helps() -> Result<()> {
    let mut stack = Stack::start(Road::Unix, &[]).await?;
    lock(&stack.guest, 0x00).await?;

    // A restarted client still says locked.
    let gone = stack.guest.ok("guest-pcsc wait-card absent 20");
    let (gone, ended) = tokio::join!(gone, stack.client.terminate());
    gone?;
    ensure!(ended?.success());
    stack.start_client(&[])?;
    stack.guest.ok("guest-pcsc wait-card present 20").await?;
    ensure_locked(&stack.guest).await?;

    // The host unlocks it while the client runs.
    unlock(&stack.database, stack.state.path()).await?;
    stack.guest.ok(&login(PIN)).await?;
    Ok(())
}

fn login(pin: &str) -> String {
    format!("pkcs11-tool -O --login --pin {pin}")
}

async fn ensure_locked(guest: &Guest) -> Result<()> {
    let ran = guest.run(&login(PIN)).await?;
    ensure!(ran.text().contains("CKR_PIN_LOCKED"), "{}", ran.text());
    Ok(())
}

/// Wrong PINs until the card is locked. PIV knows the PIN by another number than a CAC.
async fn lock(guest: &Guest, reference: u8) -> Result<()> {
    for _ in 0..2 {
        let ran = guest.run(&login("000000")).await?;
        ensure!(ran.text().contains("CKR_PIN_INCORRECT"), "{}", ran.text());
    }
    // Two wrong ones, then the right one: the count starts again.
    guest.ok(&login(PIN)).await?;
    for left in ["63C2", "63C1", "63C0"] {
        let answer =
            guest.ok(&format!("guest-pcsc transmit 002000{reference:02X}08303030303030FFFF")).await?;
        ensure!(answer.to_uppercase().contains(left), "{answer}");
    }
    ensure_locked(guest).await
}

/// `vscclient unlock` beside the program that has the card open.
async fn unlock(database: &Database, state: &Path) -> Result<()> {
    let unlock = tokio::process::Command::new(stack_tests::process::program("vscclient")?)
        .args(["unlock", "--db", &database.spec()])
        .env("XDG_STATE_HOME", state)
        .output();
    let unlock = within(None, Duration::from_secs(60), "unlock", unlock).await??;
    ensure!(unlock.status.success(), "{}", String::from_utf8_lossy(&unlock.stderr));
    Ok(())
}

pub(crate) async fn lock_and_unlock(
    guest: &Guest,
    reference: u8,
    database: &Database,
    state: &Path,
) -> Result<()> {
    lock(guest, reference).await?;
    unlock(database, state).await?;
    guest.ok(&login(PIN)).await?;
    Ok(())
}

/// QEMU's passthru deadlocks after 65 536 bytes if messages are not kept whole; this is many times that.
#[tokio::test(flavor = "multi_thread")]
async fn many_apdus_through_one_connection() -> Result<()> {
    let stack = Stack::start(Road::Unix, &[]).await?;
    let count = stack_tests::scale(10_000, 200_000);
    let start = Instant::now();
    let limit = Duration::from_secs(180) + Duration::from_millis(30) * count;
    let command = format!("guest-pcsc repeat {count} 00A4040007A0000000790100");
    let said = stack.guest.run_within(&command, limit).await?;
    ensure!(said.status == 0, "{}", said.text());
    println!("{count} APDUs in {:.1} s: {}", start.elapsed().as_secs_f64(), said.text().trim());
    Ok(())
}

//! Programs that know nothing of cards but PKCS#11.

use anyhow::{Context, Result, ensure};
use stack_tests::database::PIN;
use stack_tests::process::Process;

use super::{Algorithm, Bench, module};

/// p11tool sees the token and all that is on it, and signs with each key.
pub(super) async fn gnutls(bench: &Bench) -> Result<()> {
    let p11tool = format!("p11tool --provider {} --batch --login --set-pin {PIN}", module()?);
    let token = token(bench).await?;
    let said = bench.pcscd.ok(&format!("{p11tool} --list-all {token}")).await?;
    for (id, kind) in bench.suite.uri_ids().iter().flat_map(|id| [(id, "private"), (id, "cert")]) {
        let found = said
            .lines()
            .any(|line| line.contains(&format!(";id={id};")) && line.ends_with(&format!(";type={kind}")));
        ensure!(found, "no {kind} {id}: {said}");
    }
    for id in &bench.suite.uri_ids()[..bench.suite.signers()] {
        let said = bench.pcscd.ok(&format!("{p11tool} --test-sign {token};id={id}")).await?;
        ensure!(said.contains("Verifying against public key in the token... ok"), "{said}");
    }
    Ok(())
}

/// The token's URI.
async fn token(bench: &Bench) -> Result<String> {
    let said = bench.pcscd.ok(&format!("p11tool --provider {} --list-token-urls", module()?)).await?;
    let uri = said.lines().find(|line| line.starts_with("pkcs11:") && line.contains("serial="));
    Ok(uri.with_context(|| format!("no token: {said}"))?.to_owned())
}

/// A login to sshd with a key of the card, whose public half ssh-keygen took from it.
pub(super) async fn ssh(bench: &Bench) -> Result<()> {
    let pcscd = &bench.pcscd;
    let keys = pcscd.ok(&format!("ssh-keygen -D {}", module()?)).await?;
    let keys: String = keys
        .lines()
        .filter(|line| line.starts_with(bench.suite.ssh_type()))
        .map(|line| format!("{line}\n"))
        .collect();
    ensure!(keys.lines().count() == 3, "{keys}");
    std::fs::write(pcscd.path("authorized"), keys)?;
    let file = |name: &str| pcscd.path(name).display().to_string();
    std::fs::write(pcscd.path("askpass"), format!("#!/bin/sh\necho {PIN}\n"))?;
    pcscd.ok("chmod 700 askpass").await?;
    let mut host_key = pcscd.command("ssh-keygen");
    host_key.args(["-q", "-t", "ed25519", "-N", "", "-f", "hostkey"]);
    ensure!(pcscd.run(host_key).await?.status.success());
    let config = format!(
        "ListenAddress 127.0.0.1:2222\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nUsePAM no\n\
         StrictModes no\nPermitRootLogin yes\nPasswordAuthentication no\n",
        file("hostkey"),
        file("authorized")
    );
    std::fs::write(pcscd.path("sshd_config"), config)?;
    let mut daemon = pcscd.command("/usr/sbin/sshd");
    daemon.args(["-D", "-e", "-f"]).arg(pcscd.path("sshd_config"));
    let daemon = Process::spawn(daemon)?;
    daemon.line("Server listening").await.context("sshd of the package openssh-server")?;
    let mut login = pcscd.command("ssh");
    login.args(["-F", "none", "-p", "2222", "-I", &module()?, "-o", "StrictHostKeyChecking=no"]);
    login.args(["-o", &format!("UserKnownHostsFile={}", file("known"))]);
    login.args(["-o", "PreferredAuthentications=publickey", "127.0.0.1", "echo logged in"]);
    login.env("SSH_ASKPASS", pcscd.path("askpass")).env("SSH_ASKPASS_REQUIRE", "force");
    let ran = pcscd.run(login).await?;
    ensure!(ran.stdout == b"logged in\n", "{}\n{}", ran.text, daemon.log());
    Ok(())
}

/// openssl signs through its PKCS#11 engine, as TLS servers and clients do. A key that asks for the PIN at each
/// use makes the engine ask a terminal, so it is the authentication key.
pub(super) async fn openssl(bench: &Bench) -> Result<()> {
    let (pcscd, digest) = (&bench.pcscd, bench.suite.digest());
    let uri = format!("pkcs11:id={};type=private;pin-value={PIN}", bench.suite.uri_ids()[0]);
    let mut sign = pcscd.command("openssl");
    sign.args(["dgst", "-engine", "pkcs11", "-keyform", "engine", "-sign", &uri]);
    sign.args([&format!("-{digest}"), "-out", "signature", "message"]);
    sign.env("PKCS11_MODULE_PATH", module()?);
    let ran = pcscd.run(sign).await?;
    ensure!(ran.status.success(), "package libengine-pkcs11-openssl: {}", ran.text);
    let key = bench.public_key(0)?;
    pcscd.ok(&format!("openssl dgst -{digest} -verify {key} -signature signature message")).await.map(drop)
}

/// NSS lists the card's certificates and keys, and signs a certificate request with one.
pub(super) async fn nss(bench: &Bench) -> Result<()> {
    let pcscd = &bench.pcscd;
    std::fs::write(pcscd.path("pin"), format!("{PIN}\n"))?;
    std::fs::create_dir(pcscd.path("nss"))?;
    pcscd.ok("certutil -N -d sql:nss --empty-password").await?;
    pcscd.ok(&format!("modutil -dbdir sql:nss -force -add card -libfile {}", module()?)).await?;
    let said = pcscd.ok("modutil -dbdir sql:nss -list").await?;
    ensure!(said.contains("token: Jane Doe"), "{said}");
    let said = pcscd.ok("certutil -L -d sql:nss -h all -f pin").await?;
    let names: Vec<&str> =
        said.lines().filter_map(|line| line.strip_suffix("u,u,u")).map(str::trim).collect();
    ensure!(names.len() == 3, "{said}");
    let (token, _) = names[0].split_once(':').with_context(|| said.clone())?;
    let said = pcscd.ok("certutil -K -d sql:nss -h all -f pin").await?;
    let kind = if bench.suite.algorithm == Algorithm::Rsa { "> rsa " } else { "> ec " };
    ensure!(said.lines().filter(|line| line.contains(kind)).count() == 3, "{said}");
    let mut request = pcscd.command("certutil");
    request.args(["-R", "-d", "sql:nss", "-h", token, "-f", "pin", "-k", bench.suite.ids()[0]]);
    request.args(["-s", "CN=request", "-a", "-o", "request"]);
    let ran = pcscd.run(request).await?;
    ensure!(ran.status.success(), "{}", ran.text);
    pcscd.ok("openssl req -in request -verify -noout").await.map(drop)
}

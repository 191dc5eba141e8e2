# MLflow for the nodes, on PostgreSQL. Nobody outside the network reaches either.

resource "aws_db_subnet_group" "mlflow" {
  name       = "${var.name}-mlflow"
  subnet_ids = aws_subnet.private[*].id
}

resource "aws_db_instance" "mlflow" {
  identifier                  = "${var.name}-mlflow"
  engine                      = "postgres"
  engine_version              = "17"
  instance_class              = "db.t4g.micro"
  allocated_storage           = 20
  storage_type                = "gp3"
  storage_encrypted           = true
  db_name                     = "mlflow"
  username                    = "mlflow"
  manage_master_user_password = true # Secrets Manager makes it, changes it and alone knows it
  db_subnet_group_name        = aws_db_subnet_group.mlflow.name
  vpc_security_group_ids      = [aws_security_group.database.id]
  publicly_accessible         = false
  backup_retention_period     = 7
  copy_tags_to_snapshot       = true
  deletion_protection         = !var.disposable
  skip_final_snapshot         = var.disposable
  final_snapshot_identifier   = "${var.name}-mlflow-last"
}

locals {
  password_arn = aws_db_instance.mlflow.master_user_secret[0].secret_arn
  mlflow_host  = "mlflow.${var.name}.internal"
}

resource "aws_cloudwatch_log_group" "mlflow" {
  name              = "/${var.name}/mlflow"
  retention_in_days = 30
}

data "aws_iam_policy_document" "tasks" {
  statement {
    actions = ["sts:AssumeRole"]
    principals {
      type        = "Service"
      identifiers = ["ecs-tasks.amazonaws.com"]
    }
  }
}

data "aws_iam_policy_document" "start" {
  statement {
    sid       = "ReadThePassword"
    actions   = ["secretsmanager:GetSecretValue"]
    resources = [local.password_arn]
  }
  statement {
    sid       = "WriteTheLog"
    actions   = ["logs:CreateLogStream", "logs:PutLogEvents"]
    resources = ["${aws_cloudwatch_log_group.mlflow.arn}:*"]
  }
  statement {
    sid       = "FetchTheImage"
    actions   = ["ecr:GetAuthorizationToken", "ecr:BatchCheckLayerAvailability", "ecr:GetDownloadUrlForLayer", "ecr:BatchGetImage"]
    resources = ["*"] # the token has no narrower resource
  }
}

data "aws_iam_policy_document" "artifacts" {
  statement {
    actions   = ["s3:ListBucket"]
    resources = [aws_s3_bucket.these["runs"].arn]
    condition {
      test     = "StringLike"
      variable = "s3:prefix"
      values   = ["mlflow/*"]
    }
  }
  statement {
    actions   = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject"]
    resources = ["${aws_s3_bucket.these["runs"].arn}/mlflow/*"]
  }
}

resource "aws_iam_role" "mlflow" {
  for_each           = toset(["start", "serve"])
  name               = "${var.name}-mlflow-${each.key}"
  assume_role_policy = data.aws_iam_policy_document.tasks.json
}

resource "aws_iam_role_policy" "mlflow_start" {
  name   = "start"
  role   = aws_iam_role.mlflow["start"].id
  policy = data.aws_iam_policy_document.start.json
}

resource "aws_iam_role_policy" "mlflow_serve" {
  name   = "artifacts"
  role   = aws_iam_role.mlflow["serve"].id
  policy = data.aws_iam_policy_document.artifacts.json
}

resource "aws_ecs_cluster" "this" {
  name = var.name
}

resource "aws_ecs_task_definition" "mlflow" {
  family                   = "${var.name}-mlflow"
  requires_compatibilities = ["FARGATE"]
  network_mode             = "awsvpc"
  cpu                      = 512
  memory                   = 2048
  execution_role_arn       = aws_iam_role.mlflow["start"].arn
  task_role_arn            = aws_iam_role.mlflow["serve"].arn
  container_definitions = jsonencode([{
    name         = "mlflow"
    image        = var.mlflow_image
    essential    = true
    user         = "10001"
    portMappings = [{ containerPort = 5000, hostPort = 5000, protocol = "tcp" }]
    environment = [
      { name = "MLFLOW_ARTIFACTS_DESTINATION", value = "s3://${var.runs_bucket}/mlflow" },
      { name = "MLFLOW_BACKEND_STORE_URI", value = "postgresql+psycopg2://mlflow@${aws_db_instance.mlflow.endpoint}/mlflow" },
      { name = "MLFLOW_SERVER_ALLOWED_HOSTS", value = "${local.mlflow_host}:5000,127.0.0.1:5000" },
      { name = "PGSSLMODE", value = "require" },
    ]
    secrets = [{ name = "PGPASSWORD", valueFrom = "${local.password_arn}:password::" }]
    # Asks the database: once its password was changed, the task is replaced and reads the new one.
    healthCheck = {
      command     = ["CMD", "python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:5000/api/2.0/mlflow/experiments/get?experiment_id=0', timeout=8)"]
      interval    = 30
      timeout     = 10
      retries     = 3
      startPeriod = 120
    }
    logConfiguration = {
      logDriver = "awslogs"
      options = {
        "awslogs-group"         = aws_cloudwatch_log_group.mlflow.name
        "awslogs-region"        = var.region
        "awslogs-stream-prefix" = "mlflow"
      }
    }
  }])
}

resource "aws_service_discovery_private_dns_namespace" "this" {
  name = "${var.name}.internal"
  vpc  = aws_vpc.this.id
}

resource "aws_service_discovery_service" "mlflow" {
  name = "mlflow"
  dns_config {
    namespace_id = aws_service_discovery_private_dns_namespace.this.id
    dns_records {
      ttl  = 10
      type = "A"
    }
  }
}

resource "aws_ecs_service" "mlflow" {
  name            = "mlflow"
  cluster         = aws_ecs_cluster.this.id
  task_definition = aws_ecs_task_definition.mlflow.arn
  desired_count   = 1
  launch_type     = "FARGATE"
  network_configuration {
    subnets         = aws_subnet.private[*].id
    security_groups = [aws_security_group.mlflow.id]
  }
  service_registries {
    registry_arn = aws_service_discovery_service.mlflow.arn
  }
  lifecycle {
    ignore_changes = [availability_zone_rebalancing] # one task; whatever AWS prefers
  }
}
